package proxy

import (
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are counts and times by worker. No label takes a value from a request or
// an answer but the HTTP status.
type metrics struct {
	registry      *prometheus.Registry
	requests      *prometheus.CounterVec
	first         *prometheus.HistogramVec
	inFlight      *prometheus.GaugeVec
	failovers     *prometheus.CounterVec
	verifications *prometheus.CounterVec
	verifyTime    prometheus.Histogram
	verified      *prometheus.GaugeVec
}

func newMetrics() *metrics {
	const ns = "chrysalis_proxy_"
	m := &metrics{
		registry:      prometheus.NewRegistry(),
		requests:      prometheus.NewCounterVec(prometheus.CounterOpts{Name: ns + "requests_total", Help: "Requests sent to a worker, by HTTP status; 0 when it did not answer."}, []string{"worker", "status"}),
		first:         prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: ns + "first_byte_seconds", Help: "From sending a request to the header of its answer.", Buckets: prometheus.ExponentialBuckets(0.001, 4, 9)}, []string{"worker"}),
		inFlight:      prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: ns + "in_flight", Help: "Requests that a worker is answering."}, []string{"worker"}),
		failovers:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: ns + "failovers_total", Help: "Requests that a worker did not begin to answer."}, []string{"worker"}),
		verifications: prometheus.NewCounterVec(prometheus.CounterOpts{Name: ns + "verifications_total", Help: "Verifications, by result: ok, the check that failed, or no-evidence."}, []string{"worker", "result"}),
		verifyTime:    prometheus.NewHistogram(prometheus.HistogramOpts{Name: ns + "verification_seconds", Help: "Checking one document of evidence.", Buckets: prometheus.ExponentialBuckets(0.0005, 2, 10)}),
		verified:      prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: ns + "worker_verified", Help: "1 while the last verification was good."}, []string{"worker"}),
	}
	m.registry.MustRegister(m.requests, m.first, m.inFlight, m.failovers, m.verifications, m.verifyTime, m.verified)
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

func (m *metrics) begin(worker string) { m.inFlight.WithLabelValues(worker).Inc() }

func (m *metrics) end(worker string, status int) {
	m.inFlight.WithLabelValues(worker).Dec()
	m.requests.WithLabelValues(worker, strconv.Itoa(status)).Inc()
}

func (m *metrics) firstByte(worker string, d time.Duration) {
	m.first.WithLabelValues(worker).Observe(d.Seconds())
}

func (m *metrics) failover(worker string) { m.failovers.WithLabelValues(worker).Inc() }

func (m *metrics) judged(worker, result string, ok bool, took time.Duration) {
	m.verifications.WithLabelValues(worker, result).Inc()
	m.verifyTime.Observe(took.Seconds())
	m.verified.WithLabelValues(worker).Set(map[bool]float64{true: 1}[ok])
}

// forget drops what was counted of a worker that is not used any more.
func (m *metrics) forget(worker string) {
	label := prometheus.Labels{"worker": worker}
	for _, vec := range []interface {
		DeletePartialMatch(labels prometheus.Labels) int
	}{m.requests, m.first, m.inFlight, m.failovers, m.verifications, m.verified} {
		vec.DeletePartialMatch(label)
	}
}

func (m *metrics) lost(worker string) {
	m.verifications.WithLabelValues(worker, "no-evidence").Inc()
	m.verified.WithLabelValues(worker).Set(0)
}
