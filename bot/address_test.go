package bot

import (
	"testing"
	"unicode/utf8"

	"github.com/go-telegram/bot/models"
)

// FuzzAddressed has entities point anywhere in any text.
func FuzzAddressed(f *testing.F) {
	f.Add("😀 say @chrysalis_bot hi", "mention", 7, 14, 0, 1, false)
	f.Add("/verify@chrysalis_bot", "bot_command", 0, 21, 3, -1, true)
	f.Fuzz(func(t *testing.T, text, kind string, offset, length, offset2, length2 int, private bool) {
		b := &Bot{id: 99, name: "chrysalis_bot"}
		m := &models.Message{Text: text, Entities: []models.MessageEntity{
			{Type: models.MessageEntityType(kind), Offset: offset, Length: length},
			{Type: models.MessageEntityTypeMention, Offset: offset2, Length: length2},
		}}
		rest, _, forUs := b.addressed(m, private)
		if private && kind != "bot_command" && !forUs {
			t.Error("a private message is for somebody else")
		}
		if utf8.ValidString(text) && (len(rest) > len(text) || !utf8.ValidString(rest) && len(m.Entities) == 0) {
			t.Errorf("%q became %q", text, rest)
		}
	})
}
