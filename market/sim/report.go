package sim

import (
	"bytes"
	"fmt"
	"sync"
	"text/tabwriter"

	"chrysalis/market"
)

// How long the phases of the runs are, and how much of the end of one is what it comes to,
// in intervals.
const (
	phase   = 60
	settled = 20
)

// seed is that of every run: they differ in nothing but what is named.
const seed = 1

// A Phase is a part of the run with honest owners.
type Phase struct {
	Name        string
	Equilibrium int64 // competitive price at the rule's target, nanotons
	Low, High   int64 // the same at the utilisations at which the rule begins to move
	Reached     int64 // mean price of the phase's end
	Intervals   int   // until the price stayed within 10% of the equilibrium; -1 for not
	Held, Asked int64 // places held at the end, and at the equilibrium, in thousandths
	points      []Point
}

// A Manipulation is a run into which somebody comes that means no good, after one phase.
type Manipulation struct {
	Name                 string
	Lowest, Highest, End int64 // mean price of an interval since then, and of the run's end
	Requests             int64 // served since then
	points               []Point
}

// A Report is what all runs come to.
type Report struct {
	Phases        []Phase
	Manipulations []Manipulation
}

// Run runs everything. It takes some seconds.
func Run() *Report {
	manipulations := []struct {
		name string
		come func(m *Market)
	}{
		{"nobody", func(*Market) {}},
		{"200 that are not attested, at nothing", func(m *Market) { m.addLiars(200, 1, false, phase*interval) }},
		{"60 attested, at nothing, refuse all", func(m *Market) { m.addLiars(60, 1, true, phase*interval) }},
		{"200 attested, at nothing, refuse all", func(m *Market) { m.addLiars(200, 1, true, phase*interval) }},
		{"60 attested, at the ceiling", func(m *Market) { m.addLiars(60, ceiling, true, phase*interval) }},
		{"200 attested, at the ceiling", func(m *Market) { m.addLiars(200, ceiling, true, phase*interval) }},
	}
	r := &Report{Manipulations: make([]Manipulation, len(manipulations))}
	var all sync.WaitGroup
	all.Go(func() { r.Phases = honest() })
	for i, x := range manipulations {
		all.Go(func() {
			m := newMarket(seed)
			m.addOwners(200, [2]int{forever, forever})
			m.addClients(300, 0)
			x.come(m)
			out := Manipulation{Name: x.name, points: m.Run(2 * phase), Lowest: forever * mTON}
			for _, p := range out.points[phase:] {
				out.Lowest, out.Highest = min(out.Lowest, p.Price), max(out.Highest, p.Price)
				out.Requests += p.Requests
			}
			out.End = end(out.points)
			r.Manipulations[i] = out
		})
	}
	all.Wait()
	return r
}

func end(points []Point) (mean int64) {
	for _, p := range points[len(points)-settled:] {
		mean += p.Price
	}
	return mean / settled
}

// honest is the run in which supply and demand change.
func honest() (phases []Phase) {
	m := newMarket(seed)
	m.addOwners(100, [2]int{forever, forever})
	m.addOwners(100, [2]int{phase * interval, 2 * phase * interval})
	m.addClients(300, 0)
	m.addClients(300, 3*phase*interval)
	for _, name := range []string{"200 owners, 300 clients", "half of the owners leave", "they come back", "twice as many clients"} {
		p := Phase{Name: name, Intervals: -1}
		rule := market.Default()
		p.Equilibrium, p.Asked = m.Equilibrium(rule.Target)
		p.Low, _ = m.Equilibrium(rule.Target + rule.Begin)
		p.High, _ = m.Equilibrium(rule.Target - rule.Begin)
		p.points = m.Run(phase)
		p.Reached = end(p.points)
		for i, point := range p.points {
			if far := max(point.Price-p.Equilibrium, p.Equilibrium-point.Price); far*10 > p.Equilibrium {
				p.Intervals = -1
			} else if p.Intervals < 0 {
				p.Intervals = i
			}
		}
		for _, point := range p.points[phase-settled:] {
			p.Held += point.Held / settled
		}
		phases = append(phases, p)
	}
	return phases
}

// Table is the report as two tables of docs/market.md.
func (r *Report) Table() string {
	var out bytes.Buffer
	w := tabwriter.NewWriter(&out, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| \t| equilibrium\t| where the rule rests\t| reached\t| off by\t| after intervals\t| places held, of those expected\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|---\t|---\t|---\t|---\t|")
	for _, p := range r.Phases {
		fmt.Fprintf(w, "| %s\t| %s\t| %s to %s\t| %s\t| %s\t| %d\t| %d of %d\t|\n", p.Name, thousandths(p.Equilibrium), thousandths(p.Low), thousandths(p.High),
			thousandths(p.Reached), percent(p.Reached, p.Equilibrium), p.Intervals, p.Held/1000, p.Asked/1000)
	}
	w.Flush()
	out.WriteByte('\n')
	honest := r.Manipulations[0]
	fmt.Fprintln(w, "| who comes\t| lowest\t| highest\t| at the end\t| off by\t| requests served\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|---\t|---\t|---\t|")
	for _, m := range r.Manipulations {
		fmt.Fprintf(w, "| %s\t| %s\t| %s\t| %s\t| %s\t| %s\t|\n", m.Name, thousandths(m.Lowest), thousandths(m.Highest), thousandths(m.End),
			percent(m.End, honest.End), percent(m.Requests, honest.Requests))
	}
	w.Flush()
	return out.String()
}

// thousandths writes nanotons as TON, rounded down.
func thousandths(nano int64) string { return fmt.Sprintf("%d.%03d", nano/1e9, nano/mTON%1000) }

// percent is how much a is off b, rounded towards b.
func percent(a, b int64) string {
	tenths := (a - b) * 1000 / b
	sign := "+"
	if tenths < 0 {
		sign, tenths = "−", -tenths
	}
	if a == b {
		sign = ""
	}
	return fmt.Sprintf("%s%d.%d%%", sign, tenths/10, tenths%10)
}

// Pictures are the files of docs/ that show the report, by name.
func (r *Report) Pictures() map[string]string {
	var low, high, mean, equilibrium [][2]int64
	for i, p := range r.Phases {
		for j, point := range p.points {
			x := int64(i*phase + j)
			low, high, mean = append(low, [2]int64{x, point.Low}), append(high, [2]int64{x, point.High}), append(mean, [2]int64{x, point.Price})
			equilibrium = append(equilibrium, [2]int64{x, p.Equilibrium})
		}
	}
	prices := market.Chart{
		Title: "Prices when supply halves, comes back, and demand doubles", X: "intervals", Y: "TON", Label: market.TON,
		Lines: []market.Line{
			{Name: "mean paid", Points: mean}, {Name: "equilibrium", Points: equilibrium, Dashed: true},
			{Name: "a tenth less", Points: low}, {Name: "a tenth more", Points: high},
		},
	}
	against := market.Chart{Title: "Prices when somebody manipulates, from interval 60 on", X: "intervals", Y: "TON", Label: market.TON}
	for _, shown := range []struct {
		name string
		run  int
	}{{"not attested", 1}, {"200 cheap", 3}, {"200 dear", 5}, {"nobody", 0}} {
		l := market.Line{Name: shown.name, Dashed: shown.run == 0}
		for x, p := range r.Manipulations[shown.run].points {
			l.Points = append(l.Points, [2]int64{int64(x), p.Price})
		}
		against.Lines = append(against.Lines, l)
	}
	return map[string]string{"market-price.svg": prices.SVG(), "market-manipulation.svg": against.SVG()}
}
