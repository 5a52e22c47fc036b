// Package explorer shows a devnet in a browser: its blocks, its accounts, and the
// records of registries among them. It also hands out money.
package explorer

import (
	"bytes"
	_ "embed"
	"fmt"
	"html/template"
	"math/big"
	"net/http"
	"strings"
	"time"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"

	"chrysalis/devnet"
	"chrysalis/registry/contract"
)

//go:embed explorer.html
var page string

var templates = template.Must(template.New("").Parse(page))

// faucet is how much a click gives, in nanotons.
var faucet = big.NewInt(10_000_000_000)

// Handler serves the pages of a chain. Everything on it is for show.
func Handler(c *devnet.Chain, globalConfig []byte) http.Handler {
	e := explorer{c}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", e.index)
	mux.HandleFunc("GET /account/{address}", e.account)
	mux.HandleFunc("POST /faucet", e.faucet)
	mux.HandleFunc("GET /global.config.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Write(globalConfig)
	})
	protection := http.NewCrossOriginProtection()
	return protection.Handler(mux)
}

type explorer struct{ chain *devnet.Chain }

type accountRow struct {
	Address string
	Balance string
	What    string
}

func (e explorer) row(a *address.Address) accountRow {
	row := accountRow{a.Bounce(true).String(), "0", "nothing"}
	state := e.chain.Account(a)
	if state == nil || !state.IsValid {
		return row
	}
	row.Balance, row.What = state.Balance.String(), strings.ToLower(string(state.Status))
	if state.StateInit != nil && state.StateInit.Code != nil {
		row.What = fmt.Sprintf("code %x…", state.StateInit.Code.Hash()[:6])
		if isRegistry(state) {
			row.What = "registry"
		}
	}
	return row
}

func isRegistry(state *tlb.AccountState) bool {
	return state != nil && state.StateInit != nil && state.StateInit.Code != nil &&
		bytes.Equal(state.StateInit.Code.Hash(), contract.Code().Hash())
}

func (e explorer) index(w http.ResponseWriter, _ *http.Request) {
	type blockRow struct {
		SeqNo        uint32
		Hash         string
		Time         string
		Key          bool
		Transactions []string
	}
	var data struct {
		GlobalID int32
		Blocks   []blockRow
		Accounts []accountRow
	}
	data.GlobalID = e.chain.GlobalID()
	for _, b := range e.chain.Blocks(50) {
		row := blockRow{b.ID.SeqNo, fmt.Sprintf("%x", b.ID.RootHash), b.Time.Format(time.TimeOnly), b.Key, nil}
		for _, tx := range b.Transactions {
			row.Transactions = append(row.Transactions, tx.Account.Bounce(true).String())
		}
		data.Blocks = append(data.Blocks, row)
	}
	for _, a := range e.chain.Accounts() {
		data.Accounts = append(data.Accounts, e.row(a))
	}
	render(w, "index", data)
}

func (e explorer) account(w http.ResponseWriter, r *http.Request) {
	a, err := address.ParseAddr(r.PathValue("address"))
	if err != nil {
		http.Error(w, "that is not an address", http.StatusBadRequest)
		return
	}
	type txRow struct {
		LT   uint64
		Time string
		Hash string
		Fees string
	}
	type recordRow struct {
		Key, Kind, Status, Until, Record string
		Signatures                       int
	}
	var data struct {
		accountRow
		Owner        string
		Records      []recordRow
		Transactions []txRow
	}
	data.accountRow = e.row(a)
	if state := e.chain.Account(a); isRegistry(state) {
		m := contract.Registry(state.StateInit.Data)
		if owner, _, err := m.Owner(); err == nil {
			data.Owner = owner.Bounce(true).String()
		}
		entries, err := m.Records(nil, contract.MaxPage)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		for _, entry := range entries {
			_, record, err := m.Record(entry.Key)
			if err != nil {
				record = []byte(err.Error())
			}
			data.Records = append(data.Records, recordRow{
				fmt.Sprintf("%x", entry.Key), entry.Kind.String(), entry.Status.String(),
				time.Unix(int64(entry.NotAfter), 0).UTC().Format(time.DateOnly), string(record), entry.Signatures,
			})
		}
	}
	list, err := e.chain.Transactions(a)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	for i := len(list) - 1; i >= 0 && i >= len(list)-50; i-- {
		tx := list[i]
		data.Transactions = append(data.Transactions, txRow{
			tx.LT, time.Unix(int64(tx.Now), 0).UTC().Format(time.TimeOnly), fmt.Sprintf("%x", tx.Hash), tx.TotalFees.Coins.String(),
		})
	}
	render(w, "account", data)
}

func (e explorer) faucet(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, 4096)
	a, err := address.ParseAddr(r.FormValue("address"))
	if err != nil {
		http.Error(w, "that is not an address", http.StatusBadRequest)
		return
	}
	if err := e.chain.Fund(a, faucet); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	http.Redirect(w, r, "/account/"+a.Bounce(true).String(), http.StatusSeeOther)
}

func render(w http.ResponseWriter, name string, data any) {
	var b bytes.Buffer
	if err := templates.ExecuteTemplate(&b, name, data); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'")
	w.Write(b.Bytes())
}
