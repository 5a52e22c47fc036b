// Package bot answers Telegram chats with the answers of verified workers.
//
// A chat with a bot is not end-to-end encrypted: Telegram's servers see every
// message to and from it. What the bot adds is that nobody behind it does: each
// question goes to a worker that was verified, through package proxy, and to
// nothing else. The bot says so to everyone who starts it.
//
// It keeps the last turns of each chat in memory, so that a question can refer to
// them, and nothing anywhere else. No message and no part of one is written to a
// log or into an error.
package bot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	telegram "github.com/go-telegram/bot"
	"github.com/go-telegram/bot/models"

	"chrysalis/openai"
)

// Backend answers questions.
type Backend interface {
	// Ask sends a chat and calls each with every piece of the answer as it comes. It
	// returns the endpoint of the worker that answered. Its error is shown to the
	// user: it must quote neither the chat nor the answer.
	Ask(ctx context.Context, chat []openai.Message, each func(piece string) error) (worker string, err error)
	// Checks describes what was checked of a worker, in lines of plain text.
	Checks(worker string) (string, error)
}

// Options are what a bot needs.
type Options struct {
	Token   string // what Telegram's BotFather gave
	Server  string // the Bot API's base URL; Telegram's own when empty
	Backend Backend
	System  string // a system message before every chat, or ""

	PerHour int // questions that a user may ask in an hour; 0 is DefaultPerHour
	AtOnce  int // answers that are written at a time; 0 is DefaultAtOnce

	Log io.Writer // what a person should know, a line each; never a message
}

// Defaults of Options.
const (
	DefaultPerHour = 60
	DefaultAtOnce  = 8
)

// Bounds, so that no user and no server of the Bot API can make the bot grow.
const (
	maxQuestion = 8 << 10  // bytes
	maxAnswer   = 32 << 10 // bytes shown of an answer
	maxHistory  = 24 << 10 // bytes of a chat that are sent along
	maxTurns    = 24       // messages of a chat that are sent along
	maxChats    = 10_000   // chats and users that are remembered
	forgetAfter = 6 * time.Hour
	maxReply    = 8 << 20 // bytes of an answer of the Bot API

	maxMessage = 4096 // UTF-16 code units, by the Bot API's sendMessage
	askTimeout = 10 * time.Minute
)

// Telegram lets a bot send about one message a second to a chat, and 20 a minute to
// a group (Bots FAQ, "My bot is hitting limits"). Edits count.
const (
	editEvery      = 1500 * time.Millisecond
	editEveryGroup = 3500 * time.Millisecond
)

// Bot is a running bot.
type Bot struct {
	options Options
	api     *telegram.Bot
	id      int64
	name    string // without @
	slots   chan struct{}
	now     func() time.Time
	wait    sync.WaitGroup

	mu    sync.Mutex
	chats map[where]*chat
	users map[int64]*allowance
}

// where is a chat, or a topic of a group.
type where struct {
	chat  int64
	topic int
}

// chat is what is remembered of a chat.
type chat struct {
	turns  []openai.Message
	worker string // who answered last
	busy   bool   // an answer is being written
	used   time.Time
}

// New asks the Bot API who the bot is. An error never holds the token.
func New(ctx context.Context, options Options) (*Bot, error) {
	if options.PerHour == 0 {
		options.PerHour = DefaultPerHour
	}
	if options.AtOnce == 0 {
		options.AtOnce = DefaultAtOnce
	}
	if options.PerHour < 1 || options.PerHour > 100_000 || options.AtOnce < 1 || options.AtOnce > 1000 {
		return nil, errors.New("a bot answers 1 to 100000 questions an hour of a user, and 1 to 1000 at once")
	}
	if options.Log == nil {
		options.Log = io.Discard
	}
	b := &Bot{
		options: options, now: time.Now, slots: make(chan struct{}, options.AtOnce),
		chats: map[where]*chat{}, users: map[int64]*allowance{},
	}
	set := []telegram.Option{
		telegram.WithSkipGetMe(),
		telegram.WithDefaultHandler(b.handle),
		// The update is taken in order, so that a chat's messages are; the answer is
		// written in the background.
		telegram.WithNotAsyncHandlers(),
		telegram.WithErrorsHandler(func(err error) { b.say("Telegram: %s", reason(err)) }),
		telegram.WithAllowedUpdates(telegram.AllowedUpdates{"message"}),
		telegram.WithUpdatesChannelCap(100),
		telegram.WithHTTPClient(pollTimeout, &bounded{http.Client{
			Timeout:       pollTimeout + 10*time.Second,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}}),
	}
	if options.Server != "" {
		set = append(set, telegram.WithServerURL(strings.TrimSuffix(options.Server, "/")))
	}
	var err error
	if b.api, err = telegram.New(options.Token, set...); err != nil {
		return nil, fmt.Errorf("start the bot: %s", reason(err))
	}
	me, err := b.api.GetMe(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask the Bot API who the bot is: %s", reason(err))
	}
	b.id, b.name = me.ID, me.Username
	return b, nil
}

const pollTimeout = 50 * time.Second

// Name is the bot's user name, without @.
func (b *Bot) Name() string { return b.name }

// Run answers until ctx ends, and then until the answers that have begun are cut
// off.
func (b *Bot) Run(ctx context.Context) {
	b.api.Start(ctx)
	b.wait.Wait()
}

func (b *Bot) say(format string, args ...any) {
	fmt.Fprintf(b.options.Log, format+"\n", args...)
}

// handle takes one update.
func (b *Bot) handle(ctx context.Context, _ *telegram.Bot, u *models.Update) {
	m := u.Message
	if m == nil || m.From == nil || m.From.IsBot || m.Text == "" {
		return
	}
	private := m.Chat.Type == models.ChatTypePrivate
	if !private && m.Chat.Type != models.ChatTypeGroup && m.Chat.Type != models.ChatTypeSupergroup {
		return
	}
	at := where{chat: m.Chat.ID}
	if m.IsTopicMessage {
		at.topic = m.MessageThreadID
	}
	text, command, forUs := b.addressed(m, private)
	if !forUs {
		return
	}
	switch command {
	case "":
		b.question(ctx, at, m, text, private)
	case "start", "help":
		b.reply(ctx, at, m, help)
	case "new":
		b.forget(at)
		b.reply(ctx, at, m, "What was said here before is forgotten.")
	case "verify":
		b.reply(ctx, at, m, b.checks(at))
	default:
		if private {
			b.reply(ctx, at, m, "There is no such command. "+help)
		}
	}
}

const help = "Ask anything. Your question goes to a worker that was verified before a byte of it was sent: " +
	"its image, model and engine are published ones, and not even the owner of the machine can read along.\n\n" +
	"But Telegram's servers see every message to and from a bot, this one too. For what they must not see, use 'chrysalis chat' or 'chrysalis proxy' on your own machine.\n\n" +
	"/verify shows what was checked of the worker that answered last\n" +
	"/new forgets what was said here before\n\n" +
	"In groups, mention me or answer one of my messages."

// checks describes the worker that answered last.
func (b *Bot) checks(at where) string {
	b.mu.Lock()
	var worker string
	if c := b.chats[at]; c != nil {
		worker = c.worker
	}
	b.mu.Unlock()
	if worker == "" {
		return "No worker has answered here yet. Ask something first."
	}
	text, err := b.options.Backend.Checks(worker)
	if err != nil {
		return "What was checked cannot be shown: " + err.Error()
	}
	return text
}

// question has a question answered, unless somebody must wait first.
func (b *Bot) question(ctx context.Context, at where, m *models.Message, text string, private bool) {
	if text == "" {
		return
	}
	if len(text) > maxQuestion {
		b.reply(ctx, at, m, fmt.Sprintf("That is too long: a question may have %d bytes.", maxQuestion))
		return
	}
	messages, refusal := b.begin(at, m.From.ID, text)
	if refusal != "" {
		b.reply(ctx, at, m, refusal)
		return
	}
	select {
	case b.slots <- struct{}{}:
	default:
		b.abandon(at)
		b.reply(ctx, at, m, "Too many questions are being answered. Try again in a minute.")
		return
	}
	b.wait.Go(func() {
		defer func() { <-b.slots }()
		b.answer(ctx, at, m, messages, private)
	})
}

// answer streams an answer into the chat.
func (b *Bot) answer(ctx context.Context, at where, m *models.Message, messages []openai.Message, private bool) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	every := editEvery
	if !private {
		every = editEveryGroup
	}
	d := &draft{bot: b, at: at, to: m.ID, every: every}
	var answer strings.Builder
	worker, err := b.options.Backend.Ask(ctx, messages, func(piece string) error {
		if answer.Len()+len(piece) > maxAnswer {
			return errTooLong
		}
		answer.WriteString(piece)
		d.show(ctx, answer.String())
		return nil
	})
	ended := answer.String()
	switch {
	case errors.Is(err, errTooLong):
		err, ended = nil, ended+"\n\n[cut off: the answer is longer than what fits here]"
	case err != nil && ended == "":
		ended = "No answer: " + err.Error()
	case err != nil:
		ended += "\n\n[broken off: " + err.Error() + "]"
	case ended == "":
		ended = "[an empty answer]"
	}
	if err != nil {
		b.abandon(at)
		b.say("a question was not answered")
	} else {
		b.finish(at, worker, answer.String())
	}
	// Even where the bot is about to end, the last words should not be missing.
	last, stop := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
	defer stop()
	d.finish(last, ended)
}

var errTooLong = errors.New("the answer is too long")

// reply sends a text that is no answer of a worker.
func (b *Bot) reply(ctx context.Context, at where, m *models.Message, text string) {
	d := &draft{bot: b, at: at, to: m.ID}
	d.finish(ctx, text)
}

// bounded is an HTTP client that reads no more than maxReply of an answer.
type bounded struct{ client http.Client }

// Do implements the library's HttpClient.
func (c *bounded) Do(r *http.Request) (*http.Response, error) {
	answer, err := c.client.Do(r)
	if err == nil {
		answer.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(answer.Body, maxReply), answer.Body}
	}
	return answer, err
}

// reason says what went wrong with the Bot API. The library's errors can hold the
// answer that they could not read, and so messages; none of their text is used.
func reason(err error) string {
	var many *telegram.TooManyRequestsError
	switch {
	case errors.As(err, &many):
		return "it asks to be left alone for a while"
	case errors.Is(err, telegram.ErrorUnauthorized), errors.Is(err, telegram.ErrorNotFound):
		return "it does not know the token; make one with BotFather and put it into the token file"
	case errors.Is(err, telegram.ErrorConflict):
		return "another program answers for this bot; stop that one"
	case errors.Is(err, telegram.ErrorForbidden):
		return "the chat does not let the bot write"
	case errors.Is(err, telegram.ErrorBadRequest):
		return "it refused a request"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return "it did not answer in time"
	}
	return "it cannot be reached, or its answer cannot be read"
}
