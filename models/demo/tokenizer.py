"""A SentencePiece-style vocabulary, learnt from a text.

It segments as llama.cpp does for tokenizer.ggml.model = "llama": a space
becomes U+2581, every character starts as a piece of its own, and the adjacent
pair whose concatenation has the highest score is merged until none is left;
characters without a piece fall back to their UTF-8 bytes.  Standard library
only.
"""
import collections
import functools
import re

SPACE = "\u2581"
SPECIAL = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
UNK, BOS, EOS, SYSTEM, USER, ASSISTANT, END = range(len(SPECIAL))
FIRST_BYTE = len(SPECIAL)
# The types of llama.cpp's token_type array.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6

# No piece crosses these limits, so each part can be segmented by itself.
PART = re.compile(f"{SPACE}?[A-Za-z]+|{SPACE}?[0-9]|{SPACE}?[^A-Za-z0-9{SPACE}]|{SPACE}", re.S)


def parts(text):
    return PART.findall(text.replace(" ", SPACE))


def learn(counts, size):
    """Byte-pair encoding: the size - 7 - 256 pieces that shorten the text most.

    counts: {part: how often}.  Returns them, the single characters first and
    then the merges in the order in which they were found.
    """
    words = {w: list(w) for w in counts}
    pieces = [SPACE] + [chr(c) for c in range(33, 127)]
    pairs, where = collections.Counter(), collections.defaultdict(set)

    def count(w, sign):
        for pair in zip(words[w], words[w][1:]):
            pairs[pair] += sign * counts[w]
            where[pair].add(w)

    for w in words:
        count(w, 1)
    while len(pieces) < size - FIRST_BYTE - 256:
        (a, b), n = max(pairs.items(), key=lambda p: (p[1], p[0]))
        if n <= 0:
            raise ValueError(f"the text gives no more than {len(pieces)} pieces")
        for w in where.pop((a, b)):
            count(w, -1)
            old, new, i = words[w], [], 0
            while i < len(old):
                if old[i:i + 2] == [a, b]:
                    new.append(a + b)
                    i += 2
                else:
                    new.append(old[i])
                    i += 1
            words[w] = new
            count(w, 1)
        if (a, b) in pairs:
            del pairs[a, b]
        if a + b not in pieces:
            pieces.append(a + b)
    return pieces


class Tokenizer:
    """tokens, scores, types: as GGUF wants them.  Ids: 7 special tokens, then
    the 256 bytes, then the pieces; an earlier piece has a higher score."""

    def __init__(self, pieces):
        self.tokens = SPECIAL + [f"<0x{b:02X}>" for b in range(256)] + pieces
        self.types = [UNKNOWN] + [CONTROL] * (FIRST_BYTE - 1) + [BYTE] * 256 + [NORMAL] * len(pieces)
        self.scores = [0.0] * (FIRST_BYTE + 256) + [-float(i) for i in range(len(pieces))]
        self.ids = {p: FIRST_BYTE + 256 + i for i, p in enumerate(pieces)}

    def encode(self, text):
        """Token ids of a text in which nothing is special."""
        return [i for p in parts(text) for i in self._part(p)]

    def decode(self, ids):
        out = b""
        for i in ids:
            if FIRST_BYTE <= i < FIRST_BYTE + 256:
                out += bytes([i - FIRST_BYTE])
            elif i >= FIRST_BYTE:
                out += self.tokens[i].replace(SPACE, " ").encode()
        return out.decode("utf-8", "replace")

    @functools.lru_cache(maxsize=1 << 20)
    def _part(self, part):
        symbols = list(part)
        while True:
            best = None
            for i in range(len(symbols) - 1):
                n = self.ids.get(symbols[i] + symbols[i + 1])
                if n is not None and (best is None or n < best[0]):
                    best = n, i
            if best is None:
                break
            i = best[1]
            symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
        out = []
        for s in symbols:
            out += [self.ids[s]] if s in self.ids else [FIRST_BYTE + b for b in s.encode()]
        return tuple(out)
