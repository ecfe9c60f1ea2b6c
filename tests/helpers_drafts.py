"""Drafts that are right as often as a test wants."""

import random

import torch

from wavedraft.generation.drafting.choice import Greedy

DRAFT = Greedy.draft


def draft_now_and_then(monkeypatch, texts, seed=0):
    """Makes drafts right in a random number of slots: rows then accept different numbers of tokens at random places."""
    chance = random.Random(seed)

    def drafted(choice, decided, slots):
        logits, transcript = torch.zeros_like(slots.logits), choice.scores.transcript
        for place, row in enumerate(transcript.active):
            first = transcript.lengths[row] + int(decided.num_accepted[place])
            num_right = chance.randrange(logits.shape[1] + 1)
            for slot in range(logits.shape[1]):
                token = int(texts[row, min(first + slot, texts.shape[1] - 1)])
                logits[place, slot, token if slot < num_right else (token + 1) % 61] = 3.0
        return DRAFT(choice, decided, slots._replace(logits=logits, chain=None))

    monkeypatch.setattr(Greedy, "draft", drafted)
