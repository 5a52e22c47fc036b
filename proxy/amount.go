package proxy

import "strconv"

// ton writes nanotons as TON.
func ton(nano uint64) string {
	text := strconv.FormatUint(nano, 10)
	for len(text) < 10 {
		text = "0" + text
	}
	whole, part := text[:len(text)-9], text[len(text)-9:]
	for len(part) > 0 && part[len(part)-1] == '0' {
		part = part[:len(part)-1]
	}
	if part != "" {
		whole += "." + part
	}
	return whole + " TON"
}
