package store

import (
	"cmp"
	"encoding/csv"
	"encoding/json"
	"io"
	"slices"
	"strconv"
)

// NoModel is the model of a row for fees of claims that no use stands behind.
const NoModel = "-"

// A Row is what one model earned on one day (UTC). Amounts are nanotons.
type Row struct {
	Day              string `json:"day"` // YYYY-MM-DD
	Model            string `json:"model"`
	Requests         uint64 `json:"requests"`
	PromptTokens     uint64 `json:"prompt_tokens"`
	CompletionTokens uint64 `json:"completion_tokens"`
	Earned           uint64 `json:"earned"`
	Claimed          uint64 `json:"claimed"` // of what was earned on that day
	Lost             uint64 `json:"lost"`    // of it, on channels that closed before it was claimed
	Fees             uint64 `json:"fees"`    // of claims on that day
}

// Pending is what has been earned and neither claimed nor lost, in nanotons.
func (r Row) Pending() uint64 {
	if gone := add(r.Claimed, r.Lost); gone < r.Earned {
		return r.Earned - gone
	}
	return 0
}

// withPending is the row as JSON has it.
func (r Row) withPending() any {
	return struct {
		Row
		Pending uint64 `json:"pending"`
	}{r, r.Pending()}
}

func (s *Store) sortedRows() []Row {
	list := make([]Row, 0, len(s.rows))
	for _, row := range s.rows {
		list = append(list, *row)
	}
	slices.SortFunc(list, func(a, b Row) int { return cmp.Or(cmp.Compare(a.Day, b.Day), cmp.Compare(a.Model, b.Model)) })
	return list
}

// Earnings returns what was earned, by day and model.
func (s *Store) Earnings() []Row {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sortedRows()
}

// Total is the sum of rows; its day and model are empty.
func Total(rows []Row) (sum Row) {
	for _, r := range rows {
		sum.Requests = add(sum.Requests, r.Requests)
		sum.PromptTokens = add(sum.PromptTokens, r.PromptTokens)
		sum.CompletionTokens = add(sum.CompletionTokens, r.CompletionTokens)
		sum.Earned = add(sum.Earned, r.Earned)
		sum.Claimed = add(sum.Claimed, r.Claimed)
		sum.Lost = add(sum.Lost, r.Lost)
		sum.Fees = add(sum.Fees, r.Fees)
	}
	return sum
}

// WriteCSV writes rows with a header line; amounts are nanotons (RFC 4180, with
// lines that end in a line feed alone).
func WriteCSV(w io.Writer, rows []Row) error {
	out := csv.NewWriter(w)
	out.Write([]string{"day", "model", "requests", "prompt_tokens", "completion_tokens", "earned", "claimed", "pending", "lost", "fees"})
	for _, r := range rows {
		line := []string{r.Day, r.Model}
		for _, n := range []uint64{r.Requests, r.PromptTokens, r.CompletionTokens, r.Earned, r.Claimed, r.Pending(), r.Lost, r.Fees} {
			line = append(line, strconv.FormatUint(n, 10))
		}
		out.Write(line)
	}
	out.Flush()
	return out.Error()
}

// WriteJSON writes rows and their total; amounts are nanotons.
func WriteJSON(w io.Writer, rows []Row) error {
	list := make([]any, len(rows))
	for i, r := range rows {
		list[i] = r.withPending()
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(struct {
		Rows  []any `json:"rows"`
		Total any   `json:"total"`
	}{list, Total(rows).withPending()})
}
