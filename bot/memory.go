package bot

import (
	"fmt"
	"slices"
	"time"

	"chrysalis/openai"
)

// allowance is what a user may still ask. It fills at an even rate.
type allowance struct {
	left float64
	at   time.Time
}

// begin notes a question of a user, and returns the chat that goes to the worker
// or why the user must wait.
func (b *Bot) begin(at where, user int64, text string) (messages []openai.Message, refusal string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	b.tidy(now)
	c := b.chats[at]
	if c == nil {
		c = &chat{}
		b.chats[at] = c
	}
	if c.busy {
		return nil, "One question at a time: the last one is still being answered."
	}
	full := float64(b.options.PerHour)
	a := b.users[user]
	if a == nil {
		a = &allowance{left: full, at: now}
		b.users[user] = a
	}
	if passed := now.Sub(a.at); passed > 0 {
		a.left = min(full, a.left+passed.Hours()*full)
		a.at = now
	}
	if a.left < 1 {
		wait := time.Duration((1 - a.left) / full * float64(time.Hour))
		return nil, fmt.Sprintf("You have asked %d questions in an hour, which is the limit. Ask again in %d minutes.", b.options.PerHour, int(wait.Minutes())+1)
	}
	a.left--
	c.busy, c.used = true, now
	c.turns = append(c.turns, openai.Message{Role: "user", Content: text})
	c.shorten()
	if b.options.System != "" {
		messages = append(messages, openai.Message{Role: "system", Content: b.options.System})
	}
	return append(messages, c.turns...), ""
}

// shorten drops the oldest turns until the rest is in bounds. What remains begins
// with a question.
func (c *chat) shorten() {
	size := 0
	first := len(c.turns)
	for first > 0 && len(c.turns)-first < maxTurns && size+len(c.turns[first-1].Content) <= maxHistory {
		first--
		size += len(c.turns[first].Content)
	}
	for first < len(c.turns)-1 && c.turns[first].Role != "user" {
		first++
	}
	c.turns = slices.Clone(c.turns[first:])
}

// finish notes an answer.
func (b *Bot) finish(at where, worker, answer string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c := b.chats[at]; c != nil {
		c.busy, c.worker, c.used = false, worker, b.now()
		// The chat may have been forgotten meanwhile.
		if len(c.turns) > 0 {
			c.turns = append(c.turns, openai.Message{Role: "assistant", Content: answer})
		}
	}
}

// abandon takes a question back that got no answer.
func (b *Bot) abandon(at where) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c := b.chats[at]; c != nil {
		c.busy = false
		if n := len(c.turns); n > 0 && c.turns[n-1].Role == "user" {
			c.turns = c.turns[:n-1]
		}
	}
}

// forget drops what was said in a chat.
func (b *Bot) forget(at where) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c := b.chats[at]; c != nil {
		c.turns = nil
	}
}

// tidy forgets chats and users that nothing was heard of, and where there are too
// many, the one that is quiet for longest.
func (b *Bot) tidy(now time.Time) {
	if len(b.chats) >= maxChats {
		var oldest *where
		for at, c := range b.chats {
			if !c.busy && now.Sub(c.used) > forgetAfter {
				delete(b.chats, at)
			} else if !c.busy && (oldest == nil || c.used.Before(b.chats[*oldest].used)) {
				oldest = &at
			}
		}
		if len(b.chats) >= maxChats && oldest != nil {
			delete(b.chats, *oldest)
		}
	}
	if len(b.users) >= maxChats {
		var longest int64
		var since time.Time
		for id, a := range b.users {
			// After an hour an allowance is full: as if it had never been.
			if now.Sub(a.at) >= time.Hour {
				delete(b.users, id)
			} else if since.IsZero() || a.at.Before(since) {
				longest, since = id, a.at
			}
		}
		if len(b.users) >= maxChats {
			delete(b.users, longest)
		}
	}
}
