package bot

import (
	"context"
	"errors"
	"strings"
	"time"

	telegram "github.com/go-telegram/bot"
	"github.com/go-telegram/bot/models"
)

// draft is an answer on its way into a chat: messages that grow by being edited.
// Where one is full, the next begins.
type draft struct {
	bot   *Bot
	at    where
	to    int           // the message that is answered
	every time.Duration // how often it may be edited

	done int    // bytes of the text that stand in messages that are full
	id   int    // the message that grows; 0 before the first
	last string // what stands in it
	next time.Time
}

// show brings the chat up to the text, unless it was edited a moment ago. The text
// only ever grows.
func (d *draft) show(ctx context.Context, text string) {
	if now := d.bot.now(); now.Before(d.next) {
		return
	}
	d.bring(ctx, text, false)
}

// finish brings the chat up to the whole text.
func (d *draft) finish(ctx context.Context, text string) { d.bring(ctx, text, true) }

func (d *draft) bring(ctx context.Context, text string, whole bool) {
	for {
		piece, full := fit(text[d.done:])
		// Until the end, what is blank is not worth a message: it would be refused.
		if strings.TrimSpace(piece) != "" && piece != d.last {
			if !d.put(ctx, piece, whole || full) {
				return
			}
			d.next = d.bot.now().Add(d.every)
		}
		if !full {
			return
		}
		d.done += len(piece)
		d.id, d.last = 0, ""
	}
}

// put writes a message or edits the one that grows. It reports whether it did; what
// must be there is tried again when the Bot API asks for patience.
func (d *draft) put(ctx context.Context, text string, must bool) bool {
	for try := 0; ; try++ {
		var err error
		if d.id == 0 {
			var m *models.Message
			p := &telegram.SendMessageParams{
				ChatID: d.at.chat, MessageThreadID: d.at.topic, Text: text,
				LinkPreviewOptions: &models.LinkPreviewOptions{IsDisabled: telegram.True()},
			}
			if d.done == 0 {
				p.ReplyParameters = &models.ReplyParameters{MessageID: d.to, AllowSendingWithoutReply: true}
			}
			if m, err = d.bot.api.SendMessage(ctx, p); err == nil {
				d.id = m.ID
			}
		} else {
			_, err = d.bot.api.EditMessageText(ctx, &telegram.EditMessageTextParams{
				ChatID: d.at.chat, MessageID: d.id, Text: text,
				LinkPreviewOptions: &models.LinkPreviewOptions{IsDisabled: telegram.True()},
			})
		}
		if err == nil {
			d.last = text
			return true
		}
		var many *telegram.TooManyRequestsError
		if !errors.As(err, &many) {
			d.bot.say("a message was not delivered: %s", reason(err))
			return false
		}
		pause := time.Duration(min(max(many.RetryAfter, 1), 60)) * time.Second
		d.next = d.bot.now().Add(pause)
		if !must || try == 3 {
			return false
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return false
		}
	}
}

// fit returns as much of a text as a message holds, cut at a line or a word where
// there is one in its last quarter, and whether there is more.
func fit(text string) (piece string, full bool) {
	units, end := 0, len(text)
	for i, r := range text {
		n := 1
		if r > 0xffff {
			n = 2
		}
		if units+n > maxMessage {
			end, full = i, true
			break
		}
		units += n
	}
	if !full {
		return text, false
	}
	for _, separator := range []string{"\n", " "} {
		if i := strings.LastIndex(text[:end], separator); i > end*3/4 {
			return text[:i+1], true
		}
	}
	return text[:end], true
}
