package bot_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf16"

	"chrysalis/attest/attesttest"
	"chrysalis/bot"
	"chrysalis/measure/record"
	"chrysalis/openai"
	"chrysalis/proxy"
)

const token = "123456:AAtesttesttesttest"

// sent is a message of the bot, with every text that it ever had.
type sent struct {
	ID     int
	Chat   string
	To     string
	Thread string
	Texts  []string
	At     []time.Time // when each of them came
}

// telegram is a server of the Bot API: getMe, getUpdates, sendMessage and
// editMessageText, with the refusals that matter.
type telegram struct {
	*httptest.Server
	mu       sync.Mutex
	updates  []json.RawMessage // not yet confirmed; their ids count from 1
	first    int               // the id of the first of them
	messages []*sent
	patience int // how many of the next messages and edits are refused with 429
	refuse   func(w http.ResponseWriter, method string) bool
}

func newTelegram(t *testing.T) *telegram {
	s := &telegram{first: 1}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *telegram) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	method, ok := strings.CutPrefix(r.URL.Path, "/bot"+token+"/")
	fail := func(code int, text string, more string) {
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"ok":false,"error_code":%d,"description":%q%s}`, code, text, more)
	}
	if !ok {
		fail(401, "Unauthorized", "")
		return
	}
	r.ParseMultipartForm(1 << 20)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refuse != nil && s.refuse(w, method) {
		return
	}
	switch method {
	case "getMe":
		fmt.Fprint(w, `{"ok":true,"result":{"id":99,"is_bot":true,"first_name":"C","username":"chrysalis_bot"}}`)
	case "getUpdates":
		var offset int
		fmt.Sscan(r.FormValue("offset"), &offset)
		for s.first < offset && len(s.updates) > 0 {
			s.updates, s.first = s.updates[1:], s.first+1
		}
		for end := time.Now().Add(2 * time.Second); len(s.updates) == 0 && time.Now().Before(end) && r.Context().Err() == nil; {
			s.mu.Unlock()
			time.Sleep(5 * time.Millisecond)
			s.mu.Lock()
		}
		list := []string{}
		for i, u := range s.updates {
			list = append(list, fmt.Sprintf(`{"update_id":%d,"message":%s}`, s.first+i, u))
		}
		fmt.Fprintf(w, `{"ok":true,"result":[%s]}`, strings.Join(list, ","))
	case "sendMessage", "editMessageText":
		text := r.FormValue("text")
		if s.patience > 0 {
			s.patience--
			fail(429, "Too Many Requests: retry after 1", `,"parameters":{"retry_after":1}`)
			return
		}
		if len(utf16.Encode([]rune(text))) > 4096 || strings.TrimSpace(text) == "" {
			fail(400, "Bad Request: message is too long or empty", "")
			return
		}
		var m *sent
		if method == "sendMessage" {
			m = &sent{ID: 1000 + len(s.messages), Chat: r.FormValue("chat_id"), To: r.FormValue("reply_parameters"), Thread: r.FormValue("message_thread_id")}
			s.messages = append(s.messages, m)
		} else {
			i := slices.IndexFunc(s.messages, func(m *sent) bool { return fmt.Sprint(m.ID) == r.FormValue("message_id") })
			if i < 0 || s.messages[i].Texts[len(s.messages[i].Texts)-1] == text {
				fail(400, "Bad Request: message is not modified", "")
				return
			}
			m = s.messages[i]
		}
		m.Texts, m.At = append(m.Texts, text), append(m.At, time.Now())
		fmt.Fprintf(w, `{"ok":true,"result":{"message_id":%d,"date":1,"chat":{"id":1,"type":"private"},"text":""}}`, m.ID)
	default:
		fail(404, "Not Found", "")
	}
}

// message is an update of a user in a chat.
type message struct {
	chat, user int
	kind       string // private when empty
	text       string
	entities   string
	more       string
}

func (s *telegram) say(m message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.kind == "" {
		m.kind = "private"
	}
	if m.entities == "" {
		m.entities = "[]"
	}
	text, _ := json.Marshal(m.text)
	s.updates = append(s.updates, json.RawMessage(fmt.Sprintf(
		`{"message_id":7,"date":1,"from":{"id":%d,"is_bot":false,"first_name":"U"},"chat":{"id":%d,"type":%q},"text":%s,"entities":%s%s}`,
		m.user, m.chat, m.kind, text, m.entities, m.more)))
}

// last waits until the nth message to the chat has a text that holds want, and
// returns all texts that it had.
func (s *telegram) last(t *testing.T, chat, n int, want string) []string {
	t.Helper()
	var have []*sent
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		s.mu.Lock()
		have = nil
		for _, m := range s.messages {
			if m.Chat == fmt.Sprint(chat) {
				c := *m
				have = append(have, &c)
			}
		}
		s.mu.Unlock()
		if len(have) > n && strings.Contains(have[n].Texts[len(have[n].Texts)-1], want) {
			return have[n].Texts
		}
	}
	for _, m := range have {
		t.Logf("%.300q", m.Texts[len(m.Texts)-1])
	}
	t.Fatalf("message %d to chat %d with %q did not come", n, chat, want)
	return nil
}

// backend answers as a function says.
type backend struct {
	ask func(ctx context.Context, chat []openai.Message, each func(string) error) error
}

func (b backend) Ask(ctx context.Context, chat []openai.Message, each func(string) error) (string, error) {
	return "https://worker:1", b.ask(ctx, chat, each)
}
func (b backend) Checks(worker string) (string, error) { return "✔ checks of " + worker, nil }

// echo answers with the whole chat.
func echo(_ context.Context, chat []openai.Message, each func(string) error) error {
	var words []string
	for _, m := range chat {
		words = append(words, m.Role+"="+m.Content)
	}
	return each(strings.Join(words, "|"))
}

type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) { b.mu.Lock(); defer b.mu.Unlock(); return b.b.Write(p) }
func (b *buffer) String() string              { b.mu.Lock(); defer b.mu.Unlock(); return b.b.String() }

// running is a bot that runs until the test ends or stop is called. The chat sees
// the whole of an answer before the bot has noted it: only once it has settled,
// the next question is not one too many.
type running struct {
	*bot.Bot
	log  *buffer
	stop func()
}

func start(t *testing.T, s *telegram, o bot.Options) running {
	t.Helper()
	log := &buffer{}
	o.Token, o.Server, o.Log = token, s.URL, log
	b, err := bot.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if b.Name() != "chrysalis_bot" {
		t.Fatalf("its name is %q", b.Name())
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); b.Run(ctx) }()
	var once sync.Once
	stop := func() { once.Do(func() { cancel(); <-ended }) }
	t.Cleanup(stop)
	return running{b, log, stop}
}

func TestStreams(t *testing.T) {
	s := newTelegram(t)
	var whole strings.Builder
	b := start(t, s, bot.Options{Backend: backend{func(_ context.Context, _ []openai.Message, each func(string) error) error {
		for i := range 20 {
			piece := fmt.Sprintf("%d ", i)
			whole.WriteString(piece)
			if err := each(piece); err != nil {
				return err
			}
			time.Sleep(100 * time.Millisecond)
		}
		return nil
	}}})
	s.say(message{chat: 5, user: 5, text: "count"})
	texts := s.last(t, 5, 0, " 19 ")
	b.Settle()
	s.mu.Lock()
	defer s.mu.Unlock()
	if texts[0] != "0 " || texts[len(texts)-1] != whole.String() {
		t.Errorf("the message had the texts %q", texts)
	}
	// All but the last edit keep their distance.
	for i, at := range s.messages[0].At[1 : len(texts)-1] {
		if d := at.Sub(s.messages[0].At[i]); d < 1500*time.Millisecond {
			t.Errorf("edit %d of %q came after %s", i+1, texts, d)
		}
	}
	if !strings.Contains(s.messages[0].To, `"message_id":7`) {
		t.Errorf("it answers %q", s.messages[0].To)
	}
}

func TestRemembers(t *testing.T) {
	s := newTelegram(t)
	b := start(t, s, bot.Options{Backend: backend{echo}, System: "be brief"})
	s.say(message{chat: 5, user: 5, text: "first"})
	s.last(t, 5, 0, "system=be brief|user=first")
	b.Settle()
	s.say(message{chat: 5, user: 5, text: "second"})
	s.last(t, 5, 1, "system=be brief|user=first|assistant=system=be brief|user=first|user=second")
	b.Settle()
	s.say(message{chat: 6, user: 6, text: "other"})
	if texts := s.last(t, 6, 0, "user=other"); strings.Contains(texts[0], "first") {
		t.Error("another chat's words came along")
	}
	s.say(message{chat: 5, user: 5, text: "/new", entities: `[{"type":"bot_command","offset":0,"length":4}]`})
	s.last(t, 5, 2, "forgotten")
	s.say(message{chat: 5, user: 5, text: "third"})
	if texts := s.last(t, 5, 3, "user=third"); strings.Contains(texts[0], "first") {
		t.Error("what was to be forgotten came along")
	}
	b.Settle()
	s.say(message{chat: 7, user: 5, text: strings.Repeat("x", 9000)})
	s.last(t, 7, 0, "too long")
}

// TestBoundedHistory has a chat that goes on and on: what is sent along stays
// bounded, and begins with a question.
func TestBoundedHistory(t *testing.T) {
	s := newTelegram(t)
	b := start(t, s, bot.Options{Backend: backend{func(_ context.Context, chat []openai.Message, each func(string) error) error {
		size := 0
		for _, m := range chat {
			size += len(m.Content)
		}
		return each(fmt.Sprint(chat[0].Role, " ", len(chat), " ", size))
	}}})
	for n, want := range []string{"user 1 7000", "user 3 14011", "user 5 21023", "user 5 21024", "user 5 21024"} {
		s.say(message{chat: 5, user: 5, text: strings.Repeat("x", 7000)})
		s.last(t, 5, n, want)
		b.Settle()
	}
}

func TestGroups(t *testing.T) {
	for _, test := range []struct {
		name string
		m    message
		want string // the question as it reaches the worker; none when empty
	}{
		{"others talk", message{text: "hello all"}, ""},
		{"a mention", message{text: "@Chrysalis_Bot hello", entities: `[{"type":"mention","offset":0,"length":14}]`}, "user=hello"},
		{"a mention in the middle", message{text: "😀 say @chrysalis_bot hi", entities: `[{"type":"mention","offset":7,"length":14}]`}, "user=😀 say  hi"},
		{"another is mentioned", message{text: "@other hello", entities: `[{"type":"mention","offset":0,"length":6}]`}, ""},
		{"only looks like a mention", message{text: "@chrysalis_bot hello"}, ""},
		{"by id", message{text: "bot hello", entities: `[{"type":"text_mention","offset":0,"length":3,"user":{"id":99,"is_bot":true,"first_name":"C"}}]`}, "user=hello"},
		{"an answer to it", message{text: "go on", more: `,"reply_to_message":{"message_id":3,"date":1,"chat":{"id":1,"type":"group"},"from":{"id":99,"is_bot":true,"first_name":"C"}}`}, "user=go on"},
		{"an answer to another", message{text: "go on", more: `,"reply_to_message":{"message_id":3,"date":1,"chat":{"id":1,"type":"group"},"from":{"id":98,"is_bot":false,"first_name":"C"}}`}, ""},
		{"a command of its own", message{text: "/verify@chrysalis_bot", entities: `[{"type":"bot_command","offset":0,"length":21}]`}, "No worker has answered"},
		{"a command of another's", message{text: "/verify@other_bot", entities: `[{"type":"bot_command","offset":0,"length":17}]`}, ""},
		{"a command of nobody's", message{text: "/verify", entities: `[{"type":"bot_command","offset":0,"length":7}]`}, ""},
		{"entities out of bounds", message{text: "hello", entities: `[{"type":"mention","offset":3,"length":1000000},{"type":"mention","offset":-1,"length":2},{"type":"bot_command","offset":0,"length":-5},{"type":"mention","offset":9223372036854775807,"length":1}]`}, ""},
		{"a channel", message{kind: "channel", text: "@chrysalis_bot hello", entities: `[{"type":"mention","offset":0,"length":14}]`}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newTelegram(t)
			b := start(t, s, bot.Options{Backend: backend{echo}})
			test.m.chat, test.m.user = -3, 5
			if test.m.kind == "" {
				test.m.kind = "supergroup"
			}
			s.say(test.m)
			s.say(message{chat: -4, user: 6, kind: "group", text: "/help@chrysalis_bot", entities: `[{"type":"bot_command","offset":0,"length":19}]`})
			s.last(t, -4, 0, "Telegram's servers see every message")
			if test.want != "" {
				if texts := s.last(t, -3, 0, test.want); test.want[:5] == "user=" && texts[0] != test.want {
					t.Errorf("the worker got %q", texts[0])
				}
				return
			}
			b.Settle()
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, m := range s.messages {
				if m.Chat == "-3" {
					t.Errorf("it said %q", m.Texts)
				}
			}
		})
	}
}

func TestTopics(t *testing.T) {
	s := newTelegram(t)
	start(t, s, bot.Options{Backend: backend{echo}})
	mention := `[{"type":"mention","offset":0,"length":14}]`
	s.say(message{chat: -3, user: 5, kind: "supergroup", text: "@chrysalis_bot one", entities: mention, more: `,"is_topic_message":true,"message_thread_id":11`})
	s.last(t, -3, 0, "user=one")
	s.say(message{chat: -3, user: 5, kind: "supergroup", text: "@chrysalis_bot two", entities: mention, more: `,"is_topic_message":true,"message_thread_id":12`})
	if texts := s.last(t, -3, 1, "user=two"); strings.Contains(texts[0], "one") {
		t.Error("another topic's words came along")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.messages[0].Thread != "11" || s.messages[1].Thread != "12" {
		t.Errorf("the topics are %q and %q", s.messages[0].Thread, s.messages[1].Thread)
	}
}

func TestLimits(t *testing.T) {
	s := newTelegram(t)
	let := make(chan struct{})
	b := start(t, s, bot.Options{PerHour: 3, AtOnce: 2, Backend: backend{func(ctx context.Context, chat []openai.Message, each func(string) error) error {
		if chat[len(chat)-1].Content == "slow" {
			select {
			case <-let:
			case <-ctx.Done():
			}
		}
		return each("done")
	}}})
	s.say(message{chat: 1, user: 1, text: "slow"})
	s.say(message{chat: 1, user: 1, text: "quick"})
	s.last(t, 1, 0, "One question at a time")
	s.say(message{chat: 2, user: 2, text: "slow"})
	s.say(message{chat: 3, user: 3, text: "quick"})
	s.last(t, 3, 0, "Too many questions")
	close(let)
	s.last(t, 1, 1, "done")
	s.last(t, 2, 0, "done")
	b.Settle()
	for n := 2; n < 4; n++ {
		s.say(message{chat: 1, user: 1, text: "quick"})
		s.last(t, 1, n, "done")
		b.Settle()
	}
	s.say(message{chat: 1, user: 1, text: "quick"})
	s.last(t, 1, 4, "3 questions in an hour")
	// In another chat, too: it is the user who has a limit.
	s.say(message{chat: 4, user: 1, text: "quick"})
	s.last(t, 4, 0, "3 questions in an hour")
	s.say(message{chat: 5, user: 5, text: "quick"})
	s.last(t, 5, 0, "done")
}

func TestLongAnswers(t *testing.T) {
	for name, answer := range map[string]string{
		"words":      strings.Repeat("words and words ", 700),
		"surrogates": strings.Repeat("😀", 5000),
		"one word":   strings.Repeat("a", 9000),
		"lines":      strings.Repeat(strings.Repeat("b", 99)+"\n", 90),
	} {
		t.Run(name, func(t *testing.T) {
			s := newTelegram(t)
			b := start(t, s, bot.Options{Backend: backend{func(_ context.Context, _ []openai.Message, each func(string) error) error {
				for i, r := range answer {
					if err := each(answer[i : i+len(string(r))]); err != nil {
						return err
					}
				}
				return nil
			}}})
			s.say(message{chat: 5, user: 5, text: "tell"})
			said := func() string {
				s.mu.Lock()
				defer s.mu.Unlock()
				var all strings.Builder
				for _, m := range s.messages {
					all.WriteString(m.Texts[len(m.Texts)-1])
				}
				return all.String()
			}
			for end := time.Now().Add(20 * time.Second); said() != answer && time.Now().Before(end); {
				time.Sleep(5 * time.Millisecond)
			}
			b.Settle() // no more comes
			if got := said(); got != answer {
				t.Errorf("%d bytes came of %d", len(got), len(answer))
			}
		})
	}
}

func TestCutOff(t *testing.T) {
	s := newTelegram(t)
	start(t, s, bot.Options{Backend: backend{func(_ context.Context, _ []openai.Message, each func(string) error) error {
		for {
			if err := each(strings.Repeat("y", 1000)); err != nil {
				return err
			}
		}
	}}})
	s.say(message{chat: 5, user: 5, text: "never stop"})
	// 32 KiB are eight messages; the last has the reason.
	for n := range 7 {
		s.last(t, 5, n, "yyy")
	}
	s.last(t, 5, 7, "cut off")
}

func TestPatience(t *testing.T) {
	s := newTelegram(t)
	s.patience = 1
	start(t, s, bot.Options{Backend: backend{func(_ context.Context, _ []openai.Message, each func(string) error) error {
		each("half ")
		s.mu.Lock()
		s.patience = 2
		s.mu.Unlock()
		return each("whole")
	}}})
	s.say(message{chat: 5, user: 5, text: "tell"})
	s.last(t, 5, 0, "half whole")
}

func TestStop(t *testing.T) {
	s := newTelegram(t)
	began := make(chan struct{})
	b := start(t, s, bot.Options{Backend: backend{func(ctx context.Context, _ []openai.Message, each func(string) error) error {
		each("half")
		close(began)
		<-ctx.Done()
		return errors.New("the bot is being stopped")
	}}})
	s.say(message{chat: 5, user: 5, text: "tell"})
	<-began
	b.stop()
	s.last(t, 5, 0, "half\n\n[broken off: the bot is being stopped]")
}

// TestServer has the Bot API misbehave: nothing of it, and no token, is repeated.
func TestServer(t *testing.T) {
	for _, test := range []struct {
		name   string
		answer string
		status int
		want   string
	}{
		{"garbage", "<html>MARKER" + token, 200, "cannot be read"},
		{"unknown token", `{"ok":false,"error_code":401,"description":"MARKER"}`, 401, "BotFather"},
		{"conflict", `{"ok":false,"error_code":409,"description":"MARKER"}`, 409, "another program"},
		{"refusal", `{"ok":false,"error_code":400,"description":"MARKER"}`, 400, "refused"},
		{"too large", `{"ok":true,"result":{"id":1,"username":"` + strings.Repeat("MARKER", 2<<20) + `"}}`, 200, "cannot be read"},
		{"a redirect", "", 307, "cannot be read"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newTelegram(t)
			s.refuse = func(w http.ResponseWriter, _ string) bool {
				if test.status == 307 {
					w.Header().Set("Location", "http://127.0.0.1:1/")
				}
				w.WriteHeader(test.status)
				io.WriteString(w, test.answer)
				return true
			}
			_, err := bot.New(t.Context(), bot.Options{Token: token, Server: s.URL, Backend: backend{echo}})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got %v", err)
			}
			if strings.Contains(err.Error(), "MARKER") || strings.Contains(err.Error(), token) {
				t.Errorf("it repeats what it must not: %v", err)
			}
		})
	}
	_, err := bot.New(t.Context(), bot.Options{Token: token, Server: "http://127.0.0.1:1", Backend: backend{echo}})
	if err == nil || strings.Contains(err.Error(), token) {
		t.Errorf("got %v", err)
	}
}

// TestQuiet looks for words of a chat in what the bot logs, whatever goes wrong.
func TestQuiet(t *testing.T) {
	s := newTelegram(t)
	broken := false
	s.refuse = func(w http.ResponseWriter, method string) bool {
		if broken && method == "sendMessage" {
			fmt.Fprint(w, `{"ok":true,"result":"MARKER`)
			return true
		}
		return false
	}
	b := start(t, s, bot.Options{Backend: backend{func(_ context.Context, chat []openai.Message, each func(string) error) error {
		if strings.Contains(chat[len(chat)-1].Content, "fail") {
			return errors.New("no worker")
		}
		return each("MARKER")
	}}})
	s.say(message{chat: 5, user: 5, text: "MARKER fail"})
	s.last(t, 5, 0, "No answer: no worker")
	b.Settle()
	s.mu.Lock()
	broken = true
	s.mu.Unlock()
	s.say(message{chat: 5, user: 5, text: "MARKER"})
	for end := time.Now().Add(10 * time.Second); !strings.Contains(b.log.String(), "not delivered") && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	if text := b.log.String(); strings.Contains(text, "MARKER") || !strings.Contains(text, "not delivered") || !strings.Contains(text, "not answered") {
		t.Errorf("the log is %q", text)
	}
}

// TestThroughProxy has a verified worker answer, shows its checks, and then has the
// worker become one that must be refused.
func TestThroughProxy(t *testing.T) {
	vm := attesttest.NewVM(record.TDX)
	worker := attesttest.Serve(vm)
	t.Cleanup(worker.Close)
	var mu sync.Mutex
	status := 200
	worker.API = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if status != 200 {
			w.WriteHeader(status)
			fmt.Fprint(w, `{"error":{"message":"MARKER","type":"x"}}`)
			return
		}
		if r.URL.Path == "/v1/models" {
			fmt.Fprint(w, `{"data":[{"id":"org/model"}]}`)
			return
		}
		body, _ := io.ReadAll(r.Body)
		if !strings.Contains(string(body), `"model":"org/model"`) {
			t.Errorf("the worker got %s", body)
		}
		w.Header().Set("Content-Type", "text/event-stream")
		w.Header().Set(proxy.WorkerHeader, "https://somebody.else")
		fmt.Fprint(w, "data: {\"choices\":[{\"delta\":{\"content\":\"from a \"}}]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"VM\"},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n")
	})
	p, err := proxy.New(proxy.Options{
		Workers: []string{worker.URL}, Policy: vm.Policy(), Records: []*record.File{vm.Record()}, Collateral: vm.Intel.Collateral(), Loopback: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ready := make(chan struct{})
	go p.Run(ctx, func() { close(ready) })
	<-ready
	proxied := bot.NewProxied(p, "")
	defer proxied.Close()
	s := newTelegram(t)
	b := start(t, s, bot.Options{Backend: proxied})
	verify := message{chat: 5, user: 5, text: "/verify", entities: `[{"type":"bot_command","offset":0,"length":7}]`}

	s.say(message{chat: 5, user: 5, text: "who are you?"})
	s.last(t, 5, 0, "from a VM")
	b.Settle()
	s.say(verify)
	// Its root is the tests' own, not Intel's.
	texts := s.last(t, 5, 1, "✔ quote")
	for _, want := range []string{"not confidential", "✔ mrtd", "✔ model"} {
		if !strings.Contains(texts[0], want) {
			t.Errorf("%q is missing in %s", want, texts[0])
		}
	}
	for i, test := range []struct {
		status int
		want   string
	}{{429, "busy"}, {400, "/new"}, {401, "let this bot in"}, {500, "answered 500"}, {503, "no verified worker"}} {
		mu.Lock()
		status = test.status
		mu.Unlock()
		s.say(message{chat: 5, user: 5, text: "and now?"})
		s.last(t, 5, 2+i, test.want)
		b.Settle()
	}
	worker.Close()
	s.say(message{chat: 5, user: 5, text: "anybody?"})
	s.last(t, 5, 7, "your question was sent to no other")
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.messages {
		if strings.Contains(fmt.Sprint(m.Texts), "MARKER") {
			t.Errorf("a worker's words were repeated: %q", m.Texts)
		}
	}
	if strings.Contains(b.log.String(), "MARKER") {
		t.Errorf("the log is %q", b.log)
	}
}
