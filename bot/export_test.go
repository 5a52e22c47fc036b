package bot

// Settle waits until no answer is being written.
func (b *Bot) Settle() { b.wait.Wait() }
