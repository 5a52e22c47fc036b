package bot

import (
	"strings"
	"unicode/utf16"

	"github.com/go-telegram/bot/models"
)

// addressed says whether a message is for the bot, and what remains of its text
// without the command or the mention. In a private chat all is; in a group what
// mentions the bot, answers it, or is a command with its name.
func (b *Bot) addressed(m *models.Message, private bool) (text, command string, forUs bool) {
	units := utf16.Encode([]rune(m.Text))
	forUs = private || m.ReplyToMessage != nil && m.ReplyToMessage.From != nil && m.ReplyToMessage.From.ID == b.id
	var rest []uint16
	end := 0
	for _, e := range m.Entities {
		// Offsets and lengths are UTF-16 code units, and the server's word.
		if e.Offset < end || e.Length < 1 || e.Length > len(units) || e.Offset > len(units)-e.Length {
			continue
		}
		piece := string(utf16.Decode(units[e.Offset : e.Offset+e.Length]))
		switch {
		case e.Type == models.MessageEntityTypeBotCommand && e.Offset == 0:
			name, to, named := strings.Cut(strings.TrimPrefix(piece, "/"), "@")
			if named && !strings.EqualFold(to, b.name) {
				return "", "", false // another bot's
			}
			command = strings.ToLower(name)
			forUs = forUs || named
		case e.Type == models.MessageEntityTypeMention && strings.EqualFold(piece, "@"+b.name),
			e.Type == models.MessageEntityTypeTextMention && e.User != nil && e.User.ID == b.id:
			forUs = true
		default:
			continue
		}
		rest = append(rest, units[end:e.Offset]...)
		end = e.Offset + e.Length
	}
	rest = append(rest, units[end:]...)
	return strings.TrimSpace(string(utf16.Decode(rest))), command, forUs
}
