package sim

import (
	"testing"
	"time"
)

func TestX(t *testing.T) {
	at := time.Now()
	m := newMarket(1)
	m.addOwners(100, 0, forever)
	m.addOwners(100, 0, 80*interval+1)
	m.addClients(300, 0)
	m.addClients(300, 160*interval)
	show := func(points []Point) {
		for i, p := range points {
			if i%10 == 9 {
				t.Logf("%d: %4d %4d %4d held %d req %d turned %d", i, p.Price/mTON, p.Low/mTON, p.High/mTON, p.Held/1000, p.Requests, p.Turned)
			}
		}
		for _, u := range []int{600, 750, 850} {
			p, h := m.Equilibrium(u)
			t.Logf("%d: %d %d", u, p/mTON, h/1000)
		}
		t.Log(time.Since(at))
	}
	show(m.Run(80))
	show(m.Run(80))
	show(m.Run(80))
}
