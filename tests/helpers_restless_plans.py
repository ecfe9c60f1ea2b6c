"""A planner that makes a random choice at every step."""

import sys

import torch

from wavedraft.generation.drafting.draft_planner import OnePlan
from wavedraft.generation.drafting.draft_step import PLAIN, Plan

DECODER = sys.modules["wavedraft.generation.drafting.decode_tidar"]  # the package's function has this name too


def restless_plans(monkeypatch):
    """Makes `auto` choose at random."""
    plans = [Plan(4, 2), PLAIN, PLAIN, Plan(4, 1), PLAIN, Plan(4, 1), Plan(4, 4), Plan(4, 2)]
    generator = torch.Generator().manual_seed(0)

    class Restless(OnePlan):
        def choose(self):
            return plans[int(torch.randint(len(plans), (), generator=generator))]

    monkeypatch.setattr(DECODER, "planner_of", lambda *_: Restless(PLAIN))
