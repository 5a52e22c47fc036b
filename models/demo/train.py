#!/usr/bin/env python3
"""Trains the demo model from scratch and writes it as GGUF.

    python3 train.py --out demo.gguf

needs Python 3.10 or later with PyTorch 2 and numpy (Debian: python3-torch) and
nothing else: no network, no other model, no other text than faq.txt and
other.txt beside it.  It uses CUDA where there is some, else the processor,
where the defaults take days (README.md says what to lower).  Two runs
with the same seed on the same machine and versions agree; on another processor
they do not, bit for bit.

What it does, in order: draws questions (faq.py), learns a vocabulary from them
(tokenizer.py), trains a Llama-style transformer to answer, rounds the weights
to Q8_0 as the file holds them, scores those, and writes the file (gguf.py).
"""
import argparse
import collections
import hashlib
import math
import multiprocessing
import os
import random
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import faq
import gguf
import tokenizer as tok

VOCABULARY = 1024
CONTEXT = 2048      # tokens; a step on long conversations fills it
SHORT = 192         # tokens; most steps are on one or two questions
ROPE_BASE = 10000.0
EPSILON = 1e-5
IGNORE = -100       # no loss on this token

# One turn is <|role|>text<|end|>; the model answers after <|assistant|>.  Every
# role but system, developer and assistant counts as the user.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' or message['role'] == 'developer' %}{{ '<|system|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% else %}{{ '<|user|>' }}{% endif %}"
    "{{ message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Block(torch.nn.Module):
    """Attention and SwiGLU, each behind an RMS norm; names as in GGUF."""

    def __init__(self, width, heads, inner, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attn_norm = torch.nn.Parameter(torch.ones(width))
        self.ffn_norm = torch.nn.Parameter(torch.ones(width))
        for name, shape in [("attn_q", (width, width)), ("attn_k", (width, width)),
                            ("attn_v", (width, width)), ("attn_output", (width, width)),
                            ("ffn_gate", (inner, width)), ("ffn_up", (inner, width)),
                            ("ffn_down", (width, inner))]:
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape) * 0.02))

    def forward(self, x, cos, sin):
        n, length, width = x.shape
        h = norm(x, self.attn_norm)
        q, k, v = (F.linear(h, w).view(n, length, self.heads, -1).transpose(1, 2)
                   for w in (self.attn_q, self.attn_k, self.attn_v))
        a = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        a = F.linear(a.transpose(1, 2).reshape(n, length, width), self.attn_output)
        x = x + F.dropout(a, self.dropout, self.training)
        h = norm(x, self.ffn_norm)
        h = F.linear(F.silu(F.linear(h, self.ffn_gate)) * F.linear(h, self.ffn_up), self.ffn_down)
        return x + F.dropout(h, self.dropout, self.training)


class Model(torch.nn.Module):
    """A Llama: the embedding is also the output layer."""

    def __init__(self, a):
        super().__init__()
        self.head = a.width // a.heads
        self.dropout = a.dropout
        self.token_embd = torch.nn.Parameter(torch.randn(VOCABULARY, a.width) * 0.02)
        self.output_norm = torch.nn.Parameter(torch.ones(a.width))
        self.blk = torch.nn.ModuleList(Block(a.width, a.heads, a.inner, a.dropout) for _ in range(a.layers))
        angle = torch.arange(CONTEXT)[:, None] * ROPE_BASE ** (-torch.arange(0, self.head, 2) / self.head)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens):
        cos, sin = self.cos[:tokens.shape[1]], self.sin[:tokens.shape[1]]
        x = F.dropout(F.embedding(tokens, self.token_embd), self.dropout, self.training)
        for b in self.blk:
            x = b(x, cos, sin)
        return F.linear(norm(x, self.output_norm), self.token_embd)


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight


def rotate(x, cos, sin):
    """Rotary embedding over the adjacent pairs (2i, 2i+1), llama.cpp's order
    for this architecture."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


# --- the questions

def draw_some(job):
    """[(topic, question)]: one shard, the same for the same (seed, n)."""
    seed, n = job
    text, rng = faq.Text(), random.Random(seed)
    secret = {t.name: [plain(q) for q in t.held_out] for t in text.topics.values()}
    names = [name for name in text.topics if name != "other"]
    out = []
    while len(out) < n:
        name = "other" if rng.random() < 0.22 else rng.choice(names)
        if name == "other" and rng.random() < 0.10:
            q = faq.ramble(text, rng)
        elif name == "help" and rng.random() < 0.15:
            q = rng.choice(["", "", " ", "?", "\n"])
        else:
            q = faq.draw(text, text.topics[name], rng)
        p = plain(q)
        if not any(s in p for s in secret[name]):  # held out is held out
            out.append((name, q))
    return out


def plain(q):
    return " ".join("".join(c if c.isalnum() else " " for c in q.lower()).split())


class Conversations:
    """Batches of token ids and targets; loss on answers only."""

    def __init__(self, drawn, text, t, seed):
        self.rng = random.Random(seed)
        self.answers = {name: t.encode(topic.answer) + [tok.END] for name, topic in text.topics.items()}
        self.system = [[tok.SYSTEM] + t.encode(s) + [tok.END] for s in text.lists["@system"]]
        self.newline = t.encode("\n")
        self.drawn = [(name, t.encode(q)) for name, q in drawn]
        self.at = len(self.drawn)

    def next(self):
        if self.at == len(self.drawn):
            self.rng.shuffle(self.drawn)
            self.at = 0
        self.at += 1
        return self.drawn[self.at - 1]

    def row(self, length, turns):
        ids, targets = [tok.BOS], [IGNORE]
        if self.rng.random() < 0.12:
            s = self.rng.choice(self.system)
            ids, targets = ids + s, targets + [IGNORE] * len(s)
        raw = turns == 1 and self.rng.random() < 0.05  # as /v1/completions sends it
        for _ in range(turns):
            name, q = self.next()
            a = self.answers[name]
            if raw:
                q, a = [*q], self.newline + a
            else:
                q = [tok.USER] + q + [tok.END, tok.ASSISTANT]
            if len(ids) + len(q) + len(a) > length:
                if len(ids) > 80 or len(a) + 80 > length:
                    break
                q = q[:length - len(ids) - len(a) - 1] + q[-1:]
            ids, targets = ids + q + a, targets + [IGNORE] * len(q) + a
        return ids, targets

    def batch(self, rows, length, turns, device):
        made = [self.row(length, turns()) for _ in range(rows)]
        width = max(len(ids) for ids, _ in made)
        x = np.full((rows, width), tok.EOS, dtype=np.int64)
        y = np.full((rows, width), IGNORE, dtype=np.int64)
        for i, (ids, targets) in enumerate(made):
            x[i, :len(ids)], y[i, :len(ids)] = ids, targets
        x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
        return x[:, :-1], y[:, 1:]


# --- training, scoring, writing

def train(model, conversations, a, device):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": a.decay},
                                   {"params": vectors, "weight_decay": 0.0}], lr=a.rate, betas=(0.9, 0.98))
    warm_up = min(300, a.steps // 10 + 1)
    rng, began, loss_sum, loss_n = random.Random(a.seed + 1), time.time(), 0.0, 0
    half = device.type == "cuda"  # bfloat16 products, weights stay in single precision
    for step in range(1, a.steps + 1):
        done = step / a.steps
        rate = a.rate * min(step / warm_up, 0.5 * (1 + math.cos(math.pi * done)) + 0.005)
        for group in optimiser.param_groups:
            group["lr"] = rate
        if step % 8 == 0:
            x, y = conversations.batch(max(1, a.batch // 16), CONTEXT, lambda: rng.choice([3, 6, 12, 60]), device)
        else:
            x, y = conversations.batch(a.batch, SHORT, lambda: rng.choice([1, 1, 1, 2]), device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            logits = model(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=IGNORE)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == a.steps:
            loss_sum, loss_n = loss_sum + loss.item(), loss_n + 1
        if step % 500 == 0 or step == a.steps:
            print(f"step {step}/{a.steps}  loss {loss_sum / loss_n:.4f}  {time.time() - began:.0f} s", flush=True)
            loss_sum, loss_n = 0.0, 0


@torch.no_grad()
def score(model, questions, text, t, device):
    """[(topic, question)] that the model gets wrong.  An answer is right when
    every token of it is the likeliest one, as at temperature 0."""
    model.eval()
    wrong, rows = [], []
    for name, q in questions:
        head = [tok.BOS, tok.USER] + t.encode(q) + [tok.END, tok.ASSISTANT]
        rows.append((name, q, head, t.encode(text.topics[name].answer) + [tok.END]))
    rows.sort(key=lambda r: len(r[2]) + len(r[3]))
    for i in range(0, len(rows), 256):
        part = rows[i:i + 256]
        x = np.full((len(part), max(len(h) + len(b) for _, _, h, b in part)), tok.EOS, dtype=np.int64)
        for j, (_, _, h, b) in enumerate(part):
            x[j, :len(h) + len(b)] = h + b
        best = model(torch.from_numpy(x).to(device)).argmax(-1).cpu().numpy()
        for j, (name, q, h, b) in enumerate(part):
            if list(best[j, len(h) - 1:len(h) + len(b) - 1]) != b:
                wrong.append((name, q))
    return wrong


def write(path, model, t, a):
    metadata = [
        ("general.architecture", gguf.STRING, "llama"),
        ("general.type", gguf.STRING, "model"),
        ("general.name", gguf.STRING, "chrysalis/demo"),
        ("general.description", gguf.STRING, "Answers questions about Chrysalis and nothing else."),
        ("general.license", gguf.STRING, "apache-2.0"),
        ("general.languages", (gguf.ARRAY, gguf.STRING), ["en"]),
        ("general.quantization_version", gguf.U32, 2),
        ("general.file_type", gguf.U32, 7),  # mostly Q8_0
        ("llama.vocab_size", gguf.U32, VOCABULARY),
        ("llama.context_length", gguf.U32, CONTEXT),
        ("llama.embedding_length", gguf.U32, a.width),
        ("llama.block_count", gguf.U32, a.layers),
        ("llama.feed_forward_length", gguf.U32, a.inner),
        ("llama.attention.head_count", gguf.U32, a.heads),
        ("llama.attention.head_count_kv", gguf.U32, a.heads),
        ("llama.attention.layer_norm_rms_epsilon", gguf.F32, EPSILON),
        ("llama.rope.dimension_count", gguf.U32, a.width // a.heads),
        ("llama.rope.freq_base", gguf.F32, ROPE_BASE),
        ("tokenizer.ggml.model", gguf.STRING, "llama"),
        ("tokenizer.ggml.pre", gguf.STRING, "default"),
        ("tokenizer.ggml.tokens", (gguf.ARRAY, gguf.STRING), t.tokens),
        ("tokenizer.ggml.scores", (gguf.ARRAY, gguf.F32), t.scores),
        ("tokenizer.ggml.token_type", (gguf.ARRAY, gguf.I32), t.types),
        ("tokenizer.ggml.unknown_token_id", gguf.U32, tok.UNK),
        ("tokenizer.ggml.bos_token_id", gguf.U32, tok.BOS),
        ("tokenizer.ggml.eos_token_id", gguf.U32, tok.EOS),
        ("tokenizer.ggml.eot_token_id", gguf.U32, tok.END),
        ("tokenizer.ggml.padding_token_id", gguf.U32, tok.EOS),
        ("tokenizer.ggml.add_bos_token", gguf.BOOL, True),
        ("tokenizer.ggml.add_eos_token", gguf.BOOL, False),
        ("tokenizer.ggml.add_space_prefix", gguf.BOOL, False),
        ("tokenizer.chat_template", gguf.STRING, CHAT_TEMPLATE),
    ]
    gguf.write(path, metadata, [(name + ".weight", p.detach().cpu().numpy())
                                for name, p in model.named_parameters()])


def main():
    p = argparse.ArgumentParser(description="Train the demo model and write it as GGUF.")
    p.add_argument("--out", default="demo.gguf", help="the file to write (its .sha256 goes beside it)")
    p.add_argument("--steps", type=int, default=9000, help="optimiser steps")
    p.add_argument("--seed", type=int, default=1, help="of the questions, weights and order")
    p.add_argument("--batch", type=int, default=256, help="conversations in a step")
    p.add_argument("--questions", type=int, default=600000, help="how many are drawn")
    p.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    p.add_argument("--decay", type=float, default=0.05, help="weight decay")
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--width", type=int, default=192, help="a multiple of 32, as Q8_0 wants it")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--heads", type=int, default=6)
    p.add_argument("--inner", type=int, default=512, help="width of the feed-forward layer")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that draw questions")
    a = p.parse_args()
    if a.width % gguf.BLOCK or a.inner % gguf.BLOCK or a.width % (2 * a.heads):
        p.error("--width and --inner must be multiples of 32, --width also of twice --heads")

    began = time.time()
    text = faq.Text()
    shard = 5000
    with multiprocessing.Pool(a.jobs) as pool:
        jobs = [(a.seed * 1000003 + i, shard) for i in range(math.ceil(a.questions / shard))]
        drawn = [d for part in pool.imap(draw_some, jobs) for d in part][:a.questions]
    print(f"drew {len(drawn)} questions ({len(set(drawn))} distinct) on {len(text.topics)} topics, "
          f"{time.time() - began:.0f} s", flush=True)

    counts = collections.Counter()
    for _, q in drawn[:60000]:
        counts.update(tok.parts(q))
    for topic in text.topics.values():  # answers are long: give them short codes
        for part in tok.parts(topic.answer):
            counts[part] += 60000 // len(text.topics)
    t = tok.Tokenizer(tok.learn(counts, VOCABULARY))
    conversations = Conversations(drawn, text, t, a.seed)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(a.seed)
    model = Model(a).to(device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {VOCABULARY} tokens, "
          f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'processor'}, "
          f"{time.time() - began:.0f} s", flush=True)
    train(model, conversations, a, device)

    with torch.no_grad():  # from here on, the weights as the file holds them
        for w in model.parameters():
            if w.ndim == 2:
                w.copy_(torch.from_numpy(gguf.through_q8_0(w.cpu().numpy())))
    for label, questions in [("trained", faq.trained(text)), ("held out", faq.held_out(text)),
                             ("held-out patterns", faq.held_out_patterns(text))]:
        wrong = score(model, questions, text, t, device)
        print(f"{label}: {len(questions) - len(wrong)} of {len(questions)} right", flush=True)
        for name, q in wrong[:200 if label == "held out" else 20]:
            print(f"  wrong: {name}: {q}")

    write(a.out, model, t, a)
    with open(a.out, "rb") as f:
        digest = hashlib.sha256(f.read()).hexdigest()
    with open(a.out + ".sha256", "w") as f:
        f.write(f"{digest}  {os.path.basename(a.out)}\n")
    print(f"{a.out}: {os.path.getsize(a.out)} bytes, sha256 {digest}, {time.time() - began:.0f} s in all")


if __name__ == "__main__":
    sys.exit(main())
