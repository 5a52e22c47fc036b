// Command market runs the simulation of the market, writes its pictures into docs/ and
// prints the tables of docs/market.md. It is run in the repository's root.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"chrysalis/market/sim"
	"chrysalis/outfile"
)

func main() {
	report := sim.Run()
	for name, picture := range report.Pictures() {
		if err := outfile.Write(filepath.Join("docs", name), []byte(picture), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "market:", err)
			os.Exit(1)
		}
	}
	fmt.Print(report.Table())
}
