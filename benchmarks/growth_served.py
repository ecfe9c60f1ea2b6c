"""What drafting inside vLLM should bring on one GPU, by the roofline of growth.py: the table of docs/serving.md.

    python benchmarks/growth_served.py

A step reads 2K query tokens of each request, and one branch gives fewer tokens per forward than many.
"""

from growth import H100, H200, MODELS, forward_seconds, has_room

TOKENS_PER_FORWARD = {4: 2.00, 8: 2.11}  # by K: `NUM_CHATS=40 make test-serving-dear` prints them
BATCHES, CONTEXT = (1, 8, 16, 32, 64), 2048


def main() -> None:
    print("| model, machine, K | " + " | ".join(f"batch {rows}" for rows in BATCHES) + " |")
    print("|---" * (len(BATCHES) + 1) + "|")
    for model in MODELS[:3]:
        for machine in (H100, H200):
            for length, tokens in TOKENS_PER_FORWARD.items():
                cells = []
                for rows in BATCHES:
                    step, plain = (forward_seconds(model, machine, width, rows, CONTEXT) for width in (2 * length, 1))
                    is_there = has_room(model, machine, rows, CONTEXT)
                    cells.append(f"{tokens * plain / step:.2f}" if is_there else "no room")
                print(f"| {model.name}, {machine.name}, {length} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
