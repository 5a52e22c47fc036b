#!/usr/bin/env python3
"""Asks a running OpenAI-compatible server the questions of the demo model and
prints how many answers are right, word for word.

    llama-server -m demo.gguf --port 8080
    python3 eval.py --url http://127.0.0.1:8080/v1

Standard library only.  With --tokenize it also compares llama-server's own
segmentation (its endpoint /tokenize) of every text with tokenizer.py, which
the model was trained with: they must be equal.
"""
import argparse
import concurrent.futures
import json
import random
import sys
import time
import urllib.error
import urllib.request

import faq
import gguf
import tokenizer as tok


def post(url, body, key=None):
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = "Bearer " + key
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as r:
        return json.load(r)


def ask(a, messages):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    body = {"model": a.model, "messages": messages, "temperature": 0, "max_tokens": 160}
    return post(a.url + "/chat/completions", body, a.key)["choices"][0]["message"]["content"].strip()


def score(a, label, questions, text):
    """Prints one line for the set and one for each wrong answer."""
    began = time.time()
    with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
        answers = list(pool.map(lambda q: ask(a, q[1]), questions))
    wrong = [(name, q, got) for (name, q), got in zip(questions, answers) if got != text.topics[name].answer]
    print(f"{label}: {len(questions) - len(wrong)} of {len(questions)} right, {time.time() - began:.0f} s", flush=True)
    topic = {t.answer: t.name for t in text.topics.values()}
    for name, q, got in wrong[:a.show]:
        print(f"  {name}: {q!r} was answered " + (f"as {topic[got]}" if got in topic else f"with {got!r}"))
    return len(wrong)


def without_end(questions):
    """The same questions with no mark at the end, in small letters."""
    return [(name, q.rstrip("?.!").lower()) for name, q in questions]


def chats(text, rng, n):
    """[(topic, messages)]: chats of several turns, half of them with a system
    message; the last question is the one that is scored."""
    names = [t for t in text.topics if t != "other"]
    out = []
    for i in range(n):
        messages = [{"role": "system", "content": "You are a helpful assistant."}] if i % 2 else []
        for _ in range(rng.randint(2, 6)):
            name = rng.choice(names)
            q = faq.draw(text, text.topics[name], rng)
            messages += [{"role": "user", "content": q},
                         {"role": "assistant", "content": text.topics[name].answer}]
        out.append((name, messages[:-1]))
    return out


def odd(a):
    """Input that must be answered with something, or refused as a bad request,
    but must not end the server.  Returns how often that failed."""
    failed = 0
    for label, messages in [
        ("empty", [{"role": "user", "content": ""}]),
        ("system only", [{"role": "system", "content": "You are a helpful assistant."}]),
        ("ends with an assistant", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]),
        ("unknown role", [{"role": "tool", "content": "42"}, {"role": "user", "content": "What is a TD?"}]),
        ("parts", [{"role": "user", "content": [{"type": "text", "text": "What is a TD?"}]}]),
        ("not ASCII", [{"role": "user", "content": "Что такое TD? 什么是 🦋?"}]),
        ("special tokens", [{"role": "user", "content": "<|end|><|assistant|><s></s><unk>"}]),
        ("400 words", [{"role": "user", "content": "The weather was fine. " * 100}]),
        ("400 words, a question", [{"role": "user", "content": "The weather was fine. " * 100 + "What is a TD?"}]),
        ("40,000 words", [{"role": "user", "content": "The weather was fine. " * 10000}]),
    ]:
        try:
            got = repr(ask(a, messages))
        except urllib.error.HTTPError as e:
            got = f"refused with status {e.code}"
            failed += e.code >= 500
        except OSError as e:
            got, failed = f"failed: {e}", failed + 1
        print(f"  {label}: {got}")
    return failed


def tokens_agree(a, questions, text):
    """Every text, with and without noise, through both tokenizers."""
    m = gguf.metadata(a.tokenize)
    t = tok.Tokenizer(m["tokenizer.ggml.tokens"][tok.FIRST_BYTE + 256:])
    rng = random.Random(a.seed)
    texts = {q for _, q in questions} | {x.answer for x in text.topics.values()}
    texts |= {faq.draw(text, x, rng) for x in text.topics.values() for _ in range(20)}
    texts |= {"", " ", "  two  spaces ", "tab\there", "line\nline\n\n", "Что это? 什么 🦋 é",
              "<0x0A> ▁ x▁y", "a=b*(c-d)/e_f"}
    texts = sorted(texts)
    root = a.url.removesuffix("/v1")
    with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
        theirs = list(pool.map(lambda s: post(root + "/tokenize", {"content": s, "add_special": False,
                                                                   "parse_special": False})["tokens"], texts))
    wrong = [(s, x, t.encode(s)) for s, x in zip(texts, theirs) if x != t.encode(s)]
    print(f"tokenizers: {len(texts) - len(wrong)} of {len(texts)} texts segmented alike")
    for s, x, ours in wrong[:a.show]:
        print(f"  {s!r}: server {x}, ours {ours}")
    return len(wrong)


def main():
    p = argparse.ArgumentParser(description="Score a server that serves the demo model.")
    p.add_argument("--url", default="http://127.0.0.1:8080/v1", help="of the OpenAI-compatible API")
    p.add_argument("--model", default="chrysalis/demo")
    p.add_argument("--key", help="bearer token, if the server wants one")
    p.add_argument("--trained", type=int, default=0, metavar="N",
                   help="ask only N of the trained questions, drawn at random")
    p.add_argument("--seed", type=int, default=1, help="of what is drawn")
    p.add_argument("--jobs", type=int, default=2, help="requests at a time")
    p.add_argument("--show", type=int, default=10, help="wrong answers to print of each set")
    p.add_argument("--tokenize", metavar="GGUF", help="compare tokenizers too, with this file's vocabulary")
    a = p.parse_args()
    a.url = a.url.rstrip("/")

    text, rng = faq.Text(), random.Random(a.seed)
    trained = faq.trained(text)
    if a.trained:
        trained = rng.sample(trained, min(a.trained, len(trained)))
    held_out = faq.held_out(text)
    bad = tokens_agree(a, trained + held_out, text) if a.tokenize else 0
    score(a, "trained", trained, text)
    score(a, "held out", held_out, text)
    score(a, "held out, no mark, small letters", without_end(held_out), text)
    score(a, "held-out patterns", faq.held_out_patterns(text), text)
    score(a, "chats of 2 to 6 turns", chats(text, rng, 200), text)
    print("odd input:")
    bad += odd(a)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
