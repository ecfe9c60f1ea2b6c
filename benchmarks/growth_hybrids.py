"""What a drafting step reads of a row in layers that keep a state. `growth.py` prints the table."""


def stateful_reads(num_accepted: int, num_read: int, draft_length: int, branches: list[int]) -> tuple[int, int]:
    """What a layer with a state reads in a step of a row, and in how many calls. Attention reads N + B x K in one.

    The first call brings the state to the end of the decided text. The next, from a copy, reads the rest of the draft;
    and each block of masks is read after the tokens that it follows.

    Args:
        num_accepted: tokens that the step before accepted.
        num_read: N, clean tokens of this step.
        branches: how many of these each of the B blocks follows.
    """
    clean = num_accepted + num_read - 1
    if branches == [num_read]:  # drafts and masks in their order
        return clean + draft_length, 2
    blocks = sum(branch - 1 + draft_length for branch in branches)
    return clean + blocks, 1 + (num_read > 1) + len(branches)


def print_hybrids(num_accepted: int = 3) -> None:
    """What a step reads of a row in layers with attention, and in layers with a state."""
    print("\n| K, B | attention reads | a layer with a state reads | in calls |\n|---|---|---|---|")
    for length in (4, 8, 16):
        for branches in ([length], [*range(1, length + 1)]):
            num_tokens, calls = stateful_reads(num_accepted, length, length, branches)
            num_queries = length * (1 + len(branches))
            print(f"| {length}, {len(branches)} | {num_queries} | {num_tokens} | {calls} |")
    print()
