package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"

	"chrysalis/guest"
	"chrysalis/launcher"
)

func parse(t *testing.T, args ...string) (cli, error) {
	t.Helper()
	var c cli
	parser, err := kong.New(&c, kong.Name("chrysalis"), kong.Exit(func(int) { t.Error("it exits") }))
	if err != nil {
		t.Fatal(err)
	}
	_, err = parser.Parse(args)
	return c, err
}

func TestUpFlags(t *testing.T) {
	c, err := parse(t, "up", "vm", "--image", "i", "--engine", "e", "--model", "a,b", "--model", "c",
		"--parameter", "context=2048", "--parameter", "slots=-1", "--gpu", "0000:b8:00.0", "--listen", ":0",
		"--accel", "tcg", "--replace", "--timeout", "3s", "--json")
	up := c.Up
	if err != nil || up.Name != "vm" || len(up.Model) != 2 || up.Model[0] != "a,b" || up.Parameter["context"] != 2048 ||
		up.Parameter["slots"] != -1 || up.Timeout != 3*time.Second || !up.Replace || !up.JSON || up.Accel != "tcg" || len(up.GPU) != 1 {
		t.Errorf("%+v, %v", up, err)
	}
	for name, args := range map[string][]string{
		"a parameter that is no integer": {"up", "--parameter", "x=y"},
		"a parameter without a value":    {"up", "--parameter", "x"},
		"an accelerator that is none":    {"up", "--accel", "xen"},
		"two names":                      {"up", "a", "b"},
		"two logs":                       {"logs", "--console", "--engine"},
		"no question":                    {"chat"},
		"a time without a unit":          {"down", "--timeout", "5"},
	} {
		if c, err := parse(t, args...); err == nil {
			t.Errorf("%s is accepted: %+v", name, c)
		}
	}
}

func TestUpHelpNamesShapes(t *testing.T) {
	help := (*UpCmd)(nil).Help()
	for _, name := range launcher.ShapeNames() {
		if !strings.Contains(help, name) {
			t.Errorf("%s is not in %q", name, help)
		}
	}
}

func TestPrintStates(t *testing.T) {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	var out strings.Builder
	err := printStates(&out, []launcher.State{
		{Name: "a", Life: launcher.LifeReady, Phase: guest.PhaseServe, Endpoint: "https://127.0.0.1:8443", Platform: launcher.PlatformTCG,
			Supervisor: 7, StartedAt: now.Add(-90 * time.Second), Guest: &guest.Status{Counters: guest.CounterTable{Requests: 5, Active: 1}}},
		{Name: "b", Life: launcher.LifeEnded, Failed: true, Reason: guest.ReasonDiskCorrupt, Ended: "disk-corrupt: bad"},
	}, now)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"a     ready   serve  -             1m30s   https://127.0.0.1:8443  tcg    7    5         1", "failed", "b: disk-corrupt: bad"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
}

func TestFindEndpoint(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	for where, want := range map[string]string{
		"https://127.0.0.1:8443":  "https://127.0.0.1:8443",
		"https://127.0.0.1:8443/": "https://127.0.0.1:8443",
		"http://127.0.0.1:8443":   "",
		"https://a/v1":            "",
		"https://":                "",
		"nobody":                  "",
	} {
		got, err := findEndpoint(context.Background(), where)
		if got != want || (want == "") != (err != nil) {
			t.Errorf("%s: %q, %v", where, got, err)
		}
	}
}
