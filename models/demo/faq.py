"""The text of the demo model: what it is asked, and what it must answer.

Reads faq.txt and other.txt, whose first lines describe their format.  Standard
library only; train.py and eval.py share it, so that what is scored is what was
trained on.
"""
import os
import random
import re

HERE = os.path.dirname(os.path.abspath(__file__))
CHOICE = re.compile(r"\(([^()]*)\)")
SMALL = {"a", "an", "the", "is", "are", "do", "does", "of", "to", "that", "in", "me", "my", "you", "it", "this"}
SLOT = re.compile(r"\{(\w+)\}")


class Topic:
    """One answer and the ways to ask for it."""

    def __init__(self, name):
        self.name, self.answer = name, ""
        self.names, self.questions, self.held_out = [], [], []


class Text:
    """topics: {name: Topic}, "other" (questions that it cannot answer) among
    them; lists: {"@before": [...], ...}; words: {"place": [...], ...}."""

    def __init__(self, files=("faq.txt", "other.txt")):
        self.topics, self.lists, self.words = {}, {}, {}
        for name in files:
            with open(os.path.join(HERE, name), encoding="utf-8") as f:
                self._read(name, f)
        for t in self.topics.values():
            if not t.answer or not (t.questions or t.names) or not t.held_out:
                raise ValueError(f"topic {t.name}: an answer, a question and a held-out one are needed")

    def _read(self, file, lines):
        section = None
        for number, line in enumerate(lines, 1):
            line = line.rstrip("\n")
            where = f"{file}:{number}"
            if line.startswith("== "):
                section = line[3:]
                if section in self.topics or section in self.lists:
                    raise ValueError(f"{where}: {section} is there twice")
                if section.startswith("@"):
                    self.lists[section] = []
                else:
                    self.topics[section] = Topic(section)
            elif not line or (line[0] == "#" and section is None):
                continue
            elif section.startswith("@word "):
                self.words[section[6:]] = line.split(" | ")
            elif section.startswith("@"):
                self.lists[section].append(line)
            else:
                t, kind, rest = self.topics[section], line[:3], line[3:]
                if kind == "A: " and not t.answer:
                    t.answer = rest
                elif kind == "N: ":
                    t.names += rest.split(" | ")
                elif kind == "Q: ":
                    t.questions.append(rest)
                elif kind == "T: ":
                    t.held_out.append(rest)
                else:
                    raise ValueError(f"{where}: neither A:, N:, Q: nor T:")


def expand(pattern):
    """All questions that a pattern such as "(Hi|Hello)( there|)!" stands for."""
    m = CHOICE.search(pattern)
    if not m:
        return [pattern]
    out = []
    for option in m.group(1).split("|"):
        out += expand(pattern[:m.start()] + option + pattern[m.end():])
    return [re.sub(r"  +", " ", q) for q in out]


def trained(text):
    """[(topic, question)]: every question of faq.txt as written.  Training
    draws many more from the definition patterns, slots and noise."""
    out = []
    for t in text.topics.values():
        if t.name != "other":
            out += [(t.name, q) for p in t.questions for q in expand(p)]
            out += [(t.name, f"What is {n}?") for n in t.names]
    return sorted(set(out))


def held_out(text):
    """[(topic, question)]: the free ones (T:), none of which is trained on."""
    return [(t.name, q) for t in text.topics.values() for q in t.held_out]


def held_out_patterns(text):
    """[(topic, question)]: trained names in patterns that are not trained on."""
    return [(t.name, p.replace("{}", n)) for t in text.topics.values()
            for n in t.names for p in text.lists["@held-out"]]


def fill(text, pattern, rng):
    """Fills the slots of a pattern of topic "other" at random."""
    def one(m):
        if m.group(1) == "n":
            return str(rng.choice([rng.randint(0, 12), rng.randint(0, 100), rng.randint(0, 9999)]))
        if m.group(1) == "word":
            syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(["", "", *"lnrstmx"])
                         for _ in range(rng.randint(1, 4))]
            w = "".join(syllables)
            return rng.choice([w, w, w.capitalize(), w[:rng.randint(2, 5)].upper()])
        return rng.choice(text.words[m.group(1)])
    return SLOT.sub(one, pattern)


def draw(text, topic, rng, cache={}):
    """One random question of a topic, as a person might type it."""
    if topic.name not in cache:
        cache[topic.name] = [expand(p) for p in topic.questions]
    if topic.names and (not topic.questions or rng.random() < 0.45):
        q = rng.choice(text.lists["@definition"]).replace("{}", rng.choice(topic.names))
    else:
        q = rng.choice(rng.choice(cache[topic.name]))
    if topic.name == "other":
        if rng.random() < 0.12:
            q = rng.choice(text.lists["@definition"]).replace("{}", rng.choice(["{word}", "{thing}", "{topic}"]))
        q = fill(text, q, rng)
    return noise(text, q, topic, rng)


def noise(text, q, topic, rng):
    """Politeness, other words, other case and punctuation, typing errors."""
    if topic.name != "other":
        for line in text.lists["@same"]:
            words = line.split(" | ")
            w = rng.choice(words)
            if rng.random() < 0.35 and re.search(rf"\b{re.escape(w)}\b", q, re.I):
                q = re.sub(rf"\b{re.escape(w)}\b", rng.choice(words), q, count=1, flags=re.I)
        words = q.split(" ")
        if len(words) > 3 and rng.random() < 0.12:
            words.insert(rng.randint(1, len(words) - 1), rng.choice(text.lists["@filler"]))
        if len(words) > 3 and rng.random() < 0.10:  # a small word is left out
            small = [i for i, w in enumerate(words) if w.lower() in SMALL]
            if small:
                del words[rng.choice(small)]
        q = " ".join(words)
    small_talk = topic.name in ("hello", "thanks", "bye")
    if rng.random() < 0.15:  # the end first, so that "?" stays where it was
        q = q.rstrip("?.!") + rng.choice(["", " ", "!", "??", "?!", ".", "...", " ?"])
    elif rng.random() < 0.35:
        q = q.rstrip("?.!")
    if not small_talk:
        if rng.random() < 0.12:
            a = rng.choice(text.lists["@after"])
            end = rng.choice(["", "", "?"] if a[1:2].islower() else [""])
            q = (q if a[1:2].isupper() else q.rstrip("?.!")) + a + end
        if rng.random() < 0.25:
            q = rng.choice(text.lists["@before"]) + rng.choice([q, q[:1].lower() + q[1:]])
        if rng.random() < 0.10:
            p = [rng.choice(text.lists["@preamble"]) for _ in range(rng.choice([1, 1, 1, 2, 3, 6]))]
            q = " ".join(p) + rng.choice([" ", " ", "\n", "\n\n"]) + q
    r = rng.random()
    if r < 0.30:
        q = q.lower()
    elif r < 0.36:
        q = q.upper()
    elif r < 0.42:
        q = q[:1].lower() + q[1:]
    elif r < 0.45:
        q = q.title()
    elif r < 0.50:
        q = q[:1].upper() + q[1:]
    if rng.random() < 0.12:
        q = misspell(q, rng)
    if rng.random() < 0.06:
        q = q.replace("'", rng.choice(["’", ""]))
    if rng.random() < 0.08:
        q = rng.choice([" " + q, q + " ", q + "\n", q.replace(" ", "  ", 1), "\n" + q, q.replace(",", "")])
    return q


def misspell(q, rng):
    """One typing error in a word of five letters or more (shorter ones are
    names such as RTMR that a single letter turns into another)."""
    words = [m for m in re.finditer(r"[A-Za-z]{5,}", q) if not m.group().isupper()]
    if not words:
        return q
    m = rng.choice(words)
    w, i = m.group(), rng.randint(1, len(m.group()) - 2)
    w = rng.choice([w[:i] + w[i + 1:], w[:i] + w[i] + w[i:], w[:i] + w[i + 1] + w[i] + w[i + 2:],
                    w[:i] + rng.choice("abcdefghijklmnopqrstuvwxyz") + w[i + 1:]])
    return q[:m.start()] + w + q[m.end():]


def ramble(text, rng):
    """A long message without a question that the model could answer."""
    other = text.topics["other"]
    out = []
    for _ in range(rng.choice([2, 3, 5, 10, 20, 40])):
        out.append(rng.choice(text.lists["@preamble"]) if rng.random() < 0.5
                   else fill(text, rng.choice(expand(rng.choice(other.questions))), rng))
    return " ".join(out)
