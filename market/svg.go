package market

import (
	"fmt"
	"html"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// What pictures measure, in their own units.
const (
	width, height          = 720, 300
	left, right, top, foot = 64, 12, 44, 40
	plotWidth, plotHeight  = width - left - right, height - top - foot
)

// The most that Supply draws, so that nobody can make the picture large or the others
// invisible.
const (
	maxDrawn = 256 // offers
	maxWide  = 64  // places of one of them
)

// picture collects an SVG document (SVG 1.1) of whole numbers, so that it has the same
// bytes everywhere. It has no script, no link and no style of its own: a page that shows
// it inline needs to allow nothing.
type picture struct {
	strings.Builder
	xFrom, xTo, yTo int64
}

// clean is text that may stand in the document, whoever wrote it.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return -1
		}
		return r
	}, s)
	if runes := []rune(s); len(runes) > 100 {
		s = string(runes[:100])
	}
	return html.EscapeString(s)
}

func newPicture(title string, xFrom, xTo, yTo int64) *picture {
	p := &picture{xFrom: xFrom, xTo: max(xTo, xFrom+1), yTo: max(yTo, 1)}
	fmt.Fprintf(p, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" role="img" font-family="sans-serif" font-size="12">`, width, height, width)
	fmt.Fprintf(p, `<title>%s</title><rect width="%d" height="%d" fill="#fff"/><text x="%d" y="16" font-size="14">%s</text>`+"\n", clean(title), width, height, left, clean(title))
	return p
}

// x and y are tenths of the picture's units, so that thin things are where they belong.
func (p *picture) x(v int64) int64 { return left*10 + scale(v-p.xFrom, p.xTo-p.xFrom, plotWidth*10) }
func (p *picture) y(v int64) int64 {
	return (top+plotHeight)*10 - scale(min(v, p.yTo), p.yTo, plotHeight*10)
}

// scale is v·to/of, for v from 0 to of.
func scale(v, of, to int64) int64 {
	for of > 1<<40 {
		v, of = v>>10, of>>10
	}
	return min(max(v, 0), of) * to / of
}

// tenths writes a coordinate.
func tenths(v int64) string { return fmt.Sprintf("%d.%d", v/10, v%10) }

// axes draws the frame, with at most so many lines across.
func (p *picture) axes(xName, yName string, yLabel func(int64) string) {
	for v := int64(0); v <= p.yTo; v += tick(p.yTo, 5) {
		y := tenths(p.y(v))
		fmt.Fprintf(p, `<path d="M%d %sH%d" stroke="#ddd"/><text x="%d" y="%s" dy="4" text-anchor="end">%s</text>`, left, y, width-right, left-6, y, yLabel(v))
	}
	step := tick(p.xTo-p.xFrom, 8)
	for v := (p.xFrom + step - 1) / step * step; v <= p.xTo; v += step {
		fmt.Fprintf(p, `<text x="%s" y="%d" text-anchor="middle">%d</text>`, tenths(p.x(v)), height-foot+16, v)
	}
	fmt.Fprintf(p, `<text x="%d" y="%d" text-anchor="end">%s</text><text x="%d" y="34">%s</text>`+"\n", width-right, height-6, clean(xName), left, clean(yName))
}

// tick is the smallest of 1, 2 and 5 times a power of ten that divides a range into at
// most so many.
func tick(span, most int64) int64 {
	for power := int64(1); ; power *= 10 {
		for _, n := range []int64{1, 2, 5} {
			if span/(n*power) <= most {
				return n * power
			}
		}
	}
}

// TON writes nanotons as TON in decimal, without zeros at the end.
func TON(nano int64) string {
	s := fmt.Sprintf("%d.%09d", nano/1e9, nano%1e9)
	return strings.TrimSuffix(strings.TrimRight(s, "0"), ".")
}

// Supply draws the price over the supply of offers, the cheapest first, as one SVG
// element: each offer is as wide as its owner says that its capacity is, up to 64, and
// as high as a million tokens of each kind cost. Those that are attested are green. Of
// more than 256 offers the cheapest are drawn, and what is much dearer than most is cut
// off. limit is the most that the client pays, as a sum of both kinds, 0 if there is
// none. Nothing in the offers, which strangers made, gets into it unescaped.
func Supply(title string, offers []Offer, limit int64) string {
	list := slices.DeleteFunc(slices.Clone(offers), func(o Offer) bool { return o.Price.Validate() != nil || o.Capacity < 1 })
	slices.SortFunc(list, cheaper)
	all := len(list)
	list = list[:min(all, maxDrawn)]
	var places, yTo int64
	for _, o := range list {
		places += int64(min(o.Capacity, maxWide))
	}
	if len(list) > 0 {
		yTo = min(Sum(list[len(list)-1].Price), 2*Sum(list[len(list)/2].Price))
	}
	yTo = max(yTo, limit) + max(yTo, limit)/10
	p := newPicture(title, 0, places, yTo)
	p.axes("requests at a time, as owners say", "TON for a million tokens of prompts and of completions", TON)
	var at int64
	for _, o := range list {
		wide := int64(min(o.Capacity, maxWide))
		from, to, high, low := p.x(at), p.x(at+wide), p.y(Sum(o.Price)), p.y(0)
		at += wide
		colour, word := "#bbb", "not verified"
		if o.Attested() {
			colour, word = "#1a7f37", "verified"
		}
		fmt.Fprintf(p, `<rect x="%s" y="%s" width="%s" height="%s" fill="%s" stroke="#fff" stroke-width="0.5"><title>%s: %s TON, %d at a time, %s</title></rect>`+"\n",
			tenths(from), tenths(min(high, low-10)), tenths(to-from), tenths(max(low-high, 10)), colour, clean(o.Owner), TON(Sum(o.Price)), o.Capacity, word)
	}
	if limit > 0 {
		fmt.Fprintf(p, `<path d="M%d %sH%d" stroke="#b42318" stroke-dasharray="6 4"/>`, left, tenths(p.y(limit)), width-right)
	}
	note := strconv.Itoa(all) + " offers"
	if all > len(list) {
		note += ", the cheapest " + strconv.Itoa(len(list)) + " are drawn"
	}
	fmt.Fprintf(p, `<text x="%d" y="%d">%s</text></svg>`+"\n", left, height-6, note)
	return p.String()
}

// A Line is one of a chart.
type Line struct {
	Name   string
	Points [][2]int64 // x and y, y at least 0
	Dashed bool
}

// A Chart is lines over something that goes on.
type Chart struct {
	Title, X, Y string
	Label       func(y int64) string // writes a value of y
	Lines       []Line
}

// SVG draws the chart as a document.
func (c Chart) SVG() string {
	xFrom, xTo, yTo := int64(1)<<62, int64(0), int64(0)
	for _, l := range c.Lines {
		for _, at := range l.Points {
			xFrom, xTo, yTo = min(xFrom, at[0]), max(xTo, at[0]), max(yTo, at[1])
		}
	}
	p := newPicture(c.Title, min(xFrom, xTo), xTo, yTo+yTo/10)
	p.axes(c.X, c.Y, c.Label)
	colours := []string{"#0550ae", "#b42318", "#1a7f37", "#9a6700", "#8250df"}
	for i, l := range c.Lines {
		colour, dash := colours[i%len(colours)], ""
		if l.Dashed {
			dash = ` stroke-dasharray="6 4"`
		}
		var points []string
		for _, at := range l.Points {
			points = append(points, tenths(p.x(at[0]))+","+tenths(p.y(at[1])))
		}
		fmt.Fprintf(p, `<polyline fill="none" stroke="%s" stroke-width="1.5"%s points="%s"/>`, colour, dash, strings.Join(points, " "))
		x := width - right - (len(c.Lines)-i)*110
		fmt.Fprintf(p, `<path d="M%d 30h16" stroke="%s" stroke-width="2"%s/><text x="%d" y="34">%s</text>`+"\n", x, colour, dash, x+20, clean(l.Name))
	}
	p.WriteString("</svg>\n")
	return p.String()
}
