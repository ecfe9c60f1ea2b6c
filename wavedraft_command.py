"""The command `wavedraft`. It stands beside the package: `import wavedraft` alone imports torch and transformers.

Where this module was imported first, `import wavedraft` leaves that to the verb, which checks its options before.
"""


def main() -> None:
    """Runs one verb of the command line."""
    from wavedraft.cli import main as run

    run()
