"""The page as Gradio draws it: a prompt, two lanes, the outcome, settings and the trace."""

import inspect
import os
from collections.abc import Iterator
from typing import Any, get_type_hints

from ..bench.prompts import TEXTS
from ..commands.generate import generate
from ..commands.options import EXACT_MODES, POLICIES, PRESETS
from .drawing import STYLE, TITLES, empty_lane, told
from .racer import Racer, Shown
from .settings import BY_DEFAULT, LABELS, setting_names

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it when it is imported
import gradio as gr

WELCOME = "Type a prompt, and press Race."


def web_page(racer: Racer) -> gr.Blocks:
    """The page of a loaded model. `page.launch(**LOOK)` opens it."""
    names = setting_names(racer.is_recurrent)

    def race(request: gr.Request, prompt: str, is_raw: bool, *values: str) -> Iterator[Shown]:
        yield from racer.race(request.session_hash, prompt, is_raw, dict(zip(names, values, strict=True)))

    def stop(request: gr.Request) -> None:
        racer.stop(request.session_hash)

    with gr.Blocks(title="wavedraft", analytics_enabled=False) as page:
        gr.Markdown(f"# wavedraft\n{described(racer)}")
        prompt = gr.Textbox(label="Prompt", lines=3, autofocus=True, elem_id="prompt")
        with gr.Row():
            start = gr.Button("Race", variant="primary", elem_id="race")
            halt = gr.Button("Stop", variant="stop", elem_id="stop")
        gr.Examples([[texts[0]] for texts in TEXTS.values()], inputs=[prompt], label="Prompts to try")
        status = gr.HTML(told(WELCOME), elem_id="status")
        with gr.Row(equal_height=True):
            both = [gr.HTML(empty_lane(title), elem_id=title.split()[0].lower()) for title in TITLES]
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            is_raw = gr.Checkbox(label="Continue the prompt as it is, without the chat template", elem_id="raw")
            with gr.Row():
                settings = [setting(name, racer) for name in names]
        with gr.Accordion("Trace: which forward wrote which token", open=True):
            trace = gr.HTML(elem_id="trace")
        gr.on(
            [start.click, prompt.submit],
            race,
            [prompt, is_raw, *settings],
            [status, *both, trace],
            show_progress="minimal",
            show_progress_on=status,
            concurrency_limit=1,  # a second race would take the time of the first
            api_visibility="private",
        )
        halt.click(stop, queue=False, api_visibility="private")
        page.unload(stop)
    return page


LOOK: dict[str, Any] = {
    "css": STYLE,
    "theme": gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "footer_links": [],
    "ssr_mode": False,
}  # keywords of `launch`; the fonts are the reader's own, so that nothing is loaded from elsewhere


def described(racer: Racer) -> str:
    """The model in one line."""
    adapter = f" with the adapter `{racer.fixed['adapter']}`" if racer.fixed["adapter"] else ""
    dtype = str(racer.model.dtype).removeprefix("torch.")
    return (
        f"`{racer.fixed['model']}`{adapter}, {dtype} on {racer.model.device}. Both lanes decode the same prompt with "
        "the same weights, one after the other, so that each has the machine to itself. The draft is dim."
    )


def setting(name: str, racer: Racer) -> Any:
    """The control of one setting, with the option's own help and limits."""
    told = {"label": LABELS[name], "info": help_of(name), "elem_id": name, "min_width": 260}
    choices = {"policy": POLICIES, "preset": PRESETS}
    if not racer.is_recurrent:
        numbers = [str(number) for number in range(1, racer.model.config.tidar_config["draft_length"] + 1)]
        choices = {"draft_length": ("0", *numbers), "num_branches": ("all", *numbers), "exact": EXACT_MODES}
    if name in choices:
        return gr.Dropdown([BY_DEFAULT, *choices[name]], value=BY_DEFAULT, **told)
    default = inspect.signature(generate).parameters[name].default
    return gr.Textbox("" if default is None else str(default), placeholder=BY_DEFAULT, max_lines=1, **told)


def help_of(name: str) -> str:
    """What `wavedraft generate --help` says of an option."""
    return get_type_hints(generate, include_extras=True)[name].__metadata__[0].help
