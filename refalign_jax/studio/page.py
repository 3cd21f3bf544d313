"""The page of the studio, made with Gradio; nothing on it comes from the network.

Gradio serves two folders: the studio's own for videos, and a temporary one for pictures that are dropped.
"""

from __future__ import annotations

import html
import importlib.util
import json
import os
import shutil
import tempfile
import threading
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read when Gradio is imported

import gradio as gr
from starlette.middleware import Middleware

from refalign_jax.config.sample import SolverName
from refalign_jax.data.records import Reference
from refalign_jax.inference.outputs import read_samples
from refalign_jax.inference.requests import Request
from refalign_jax.studio.access import NothingFromElsewhere
from refalign_jax.studio.jobs import Job, Shown, Studio

_CSS = Path(__file__).parent / "templates" / "page.css"
_TO_STATUS = "() => innerWidth < 700 && document.querySelector('#status').scrollIntoView({behavior: 'smooth'})"
"""On a phone, what is drawn lies below what is filled in."""

_HUGE = "200mb"
"""Largest file that can be dropped."""

_EXAMPLES = 8


class _Inputs(NamedTuple):
    """What a person fills in."""

    prompt: gr.Textbox
    zone: gr.File
    pictures: gr.State
    slots: list[gr.Column]
    seen: list[gr.Image]
    subjects: list[gr.Textbox]
    remove: list[gr.Button]
    note: gr.HTML
    settings: dict[str, Any]
    preview_every: gr.Number
    draw: gr.Button
    cancel: gr.Button
    example: gr.Button


class _Results(NamedTuple):
    """What a person gets to see."""

    status: gr.HTML
    preview: gr.Image
    video: gr.Video
    files: list[gr.DownloadButton]
    how: gr.Accordion
    about: gr.Code
    gallery: gr.Gallery


def serve(studio: Studio, host: str, port: int, examples: Path) -> None:
    """Serves the page until Ctrl-C.

    Args:
      studio: draws the videos.
      host: the address to listen on.
      port: its port.
      examples: a folder of samples whose prompts and references the page offers; it need not exist.
    """
    with tempfile.TemporaryDirectory(prefix="refalign-studio-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build(studio, _read_examples(examples, studio))
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=_HUGE,
            allowed_paths=[str(studio.folder)],
            theme=gr.themes.Base(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css_paths=_CSS,
            app_kwargs={"middleware": [Middleware(NothingFromElsewhere)]},
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"The studio is at http://{shown}:{port}/; Ctrl-C ends it. Videos go to {studio.folder}.", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"The studio has ended; it made {len(studio.finished)} videos.", flush=True)
        finally:
            studio.close()
            page.close(verbose=False)


def build(studio: Studio, examples: Sequence[Request]) -> gr.Blocks:
    """Builds the page.

    Args:
      studio: draws the videos.
      examples: what the button "Try an example" fills in, one after the other.
    """
    with gr.Blocks(title="RefAlign studio", analytics_enabled=False) as page:
        weights = html.escape(studio.generator.weights.removeprefix(f"{Path.cwd()}/"))
        gr.HTML(f"<h1>RefAlign studio</h1><p>Weights: {weights}</p>", elem_id="head")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                inputs = _make_inputs(studio, bool(examples))
            with gr.Column(scale=6, min_width=320):
                results = _make_results()
        results.gallery.render()
        _wire_pictures(studio, inputs, examples)
        _wire_drawing(studio, page, inputs, results)
    page.queue(default_concurrency_limit=None)
    return page


def _make_inputs(studio: Studio, has_examples: bool) -> _Inputs:
    most = studio.max_references
    prompt = gr.Textbox(label="Prompt", lines=3, max_lines=8, placeholder="What the video shows", elem_id="prompt")
    zone = gr.File(
        label=f"Pictures of up to {most} subjects",
        file_count="multiple",
        height=130,
        visible=most > 0,
        elem_id="pictures",
    )
    pictures = gr.State([])
    note = gr.HTML(visible=False, elem_id="note")
    slots, seen, subjects, remove = [], [], [], []
    with gr.Row():
        for number in range(most):
            with gr.Column(min_width=96, visible=False) as slot:
                label = f"Reference {number + 1}"
                look: dict[str, Any] = {"height": 170, "buttons": [], "format": "png", "elem_id": f"seen-{number + 1}"}
                seen.append(gr.Image(label=label, interactive=False, **look))
                name = f"subject-{number + 1}"
                subjects.append(gr.Textbox(label="Its subject", placeholder="cat", max_lines=1, elem_id=name))
                remove.append(gr.Button("Remove", size="sm", min_width=60))
            slots.append(slot)
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", min_width=120, elem_id="draw")
        cancel = gr.Button("Cancel", variant="stop", visible=False, min_width=120, elem_id="cancel")
        example = gr.Button("Try an example", visible=has_examples, min_width=120, elem_id="example")
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        settings, preview_every = _make_settings(studio)
    pictured = zone, pictures, slots, seen, subjects, remove, note
    return _Inputs(prompt, *pictured, settings, preview_every, draw, cancel, example)


def _make_settings(studio: Studio) -> tuple[dict[str, Any], gr.Number]:
    """Components by the names of the fields of `GenerateConfig` that they set, and that of the previews."""
    generator = studio.generator
    (frames, rows, columns), sampling = generator.size, generator.config.sampling
    settings: dict[str, Any] = {}
    with gr.Row():
        settings["height"] = gr.Number(rows, label="Height, pixels", precision=0, min_width=90)
        settings["width"] = gr.Number(columns, label="Width, pixels", precision=0, min_width=90)
        settings["num_frames"] = gr.Number(
            frames, label="Frames, 4k+1", precision=0, min_width=90, elem_id="num_frames"
        )
    with gr.Row():
        settings["num_steps"] = gr.Number(
            sampling.num_steps, label="Steps", precision=0, min_width=90, elem_id="num_steps"
        )
        settings["solver"] = gr.Dropdown(
            list(typing.get_args(SolverName)), value=sampling.solver, label="Solver", min_width=90
        )
        settings["seed"] = gr.Number(generator.generate.seed, label="Seed", precision=0, min_width=90)
    with gr.Row():
        settings["reference_guidance"] = gr.Number(
            sampling.reference_guidance, label="Guidance of references", min_width=120
        )
        settings["text_guidance"] = gr.Number(sampling.text_guidance, label="Guidance of the text", min_width=120)
    settings["negative_prompt"] = gr.Textbox(
        generator.generate.negative_prompt or "", label="Negative prompt", lines=2, max_lines=4
    )
    models = _background_models()
    settings["remove_background"] = gr.Dropdown(
        [("leave it as it is", ""), *((name, name) for name in models)],
        value=generator.generate.remove_background,
        label="Background of the pictures",
        info="A model's weights are fetched when it is first used." if models else "",
        visible=bool(models),
    )
    preview_every = gr.Number(
        max(1, sampling.num_steps // 8),
        label="Steps between previews",
        info="0 for none, which spares the memory of the VAE while steps are taken.",
        precision=0,
        elem_id="preview_every",
    )
    return settings, preview_every


def _background_models() -> list[str]:
    if importlib.util.find_spec("rembg") is None:
        return []
    from rembg.sessions import sessions_names

    return sorted(sessions_names)


def _make_results() -> _Results:
    status = gr.HTML(_says(Shown("done", "Type a prompt, drop pictures, and press Draw.")), elem_id="status")
    preview = gr.Image(visible=False, interactive=False, buttons=[], format="png", elem_id="preview")
    video = gr.Video(
        label="Video", visible=False, interactive=False, autoplay=True, loop=True, buttons=[], elem_id="video"
    )
    with gr.Row():
        files = [
            gr.DownloadButton(f"Download {kind}", visible=False, size="md", min_width=120, elem_id=kind.lower())
            for kind in ("MP4", "JSON")
        ]
    with gr.Accordion("How it was made", open=False, visible=False) as how:
        about = gr.Code(language="json", show_label=False, max_lines=24, wrap_lines=True)
    gallery = gr.Gallery(
        label="Made since the studio was started",
        visible=False,
        columns=4,
        fit_columns=False,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        buttons=[],
        elem_id="gallery",
        render=False,
    )
    return _Results(status, preview, video, files, how, about, gallery)


def _wire_pictures(studio: Studio, inputs: _Inputs, examples: Sequence[Request]) -> None:
    """Shows pictures as the model sees them whenever they, or what they depend on, change; fills in examples."""
    names, most = ("height", "width", "remove_background"), studio.max_references
    values = [inputs.settings[name] for name in names]
    outputs = [inputs.pictures, inputs.zone, inputs.note, *inputs.slots, *inputs.seen]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def see(held: list[Path], dropped: list[str] | None, *given: Any) -> list[Any]:
        settings = dict(zip(names, given, strict=True))
        kept, images, note = _look(studio, held, [Path(name) for name in dropped or ()], settings)
        there = [number < len(images) for number in range(most)]
        shown = [images[number] if there[number] else None for number in range(most)]
        slots = [gr.Column(visible=visible) for visible in there]
        return [kept, None, gr.HTML(note, visible=bool(note)), *slots, *shown]

    inputs.zone.upload(see, [inputs.pictures, inputs.zone, *values], outputs, trigger_mode="always_last", **quiet)
    gr.on(
        [value.change for value in values],
        lambda held, *given: see(held, None, *given),
        [inputs.pictures, *values],
        outputs,
        trigger_mode="always_last",
        **quiet,
    )
    for number, button in enumerate(inputs.remove):

        def take_away(held: list[Path], *given: Any, number: int = number) -> list[Any]:
            words = [*given[:number], *given[number + 1 : most], ""]
            return [*see([*held[:number], *held[number + 1 :]], None, *given[most:]), *words]

        button.click(take_away, [inputs.pictures, *inputs.subjects, *values], [*outputs, *inputs.subjects], **quiet)
    turn = gr.State(0)

    def fill(turn: int, *given: Any) -> list[Any]:
        example = examples[turn % len(examples)]
        words = [reference.subject or "" for reference in example.references]
        held = [reference.path for reference in example.references]
        return [*see(held, None, *given), turn + 1, example.prompt, *[*words, *[""] * most][:most]]  # type: ignore[arg-type]

    inputs.example.click(fill, [turn, *values], [*outputs, turn, inputs.prompt, *inputs.subjects], **quiet)


def _look(
    studio: Studio, held: Sequence[Path], dropped: Sequence[Path], settings: dict[str, Any]
) -> tuple[list[Path], Sequence[Any], str]:
    """Looks at the pictures that are there and at others that were dropped.

    Returns:
      Those that are kept, all of them as the model sees them, and what to say about them as HTML.
    """
    kept, images, notes, wrong = list(held), list[Any](), list[str](), list[str]()
    for path in [None, *dropped]:
        tried = kept if path is None else [*kept, path]
        try:
            found, notes = studio.see(tried, settings)
            images, kept = list(found), tried
        except Exception as error:  # whatever a file holds, the page goes on
            wrong.append(studio.explain(error, tried))
    heading = ["This is what the model sees."] if images else []
    return kept, images, "".join(map(_wrong, wrong)) + _small([*heading, *notes])


def _wire_drawing(studio: Studio, page: gr.Blocks, inputs: _Inputs, results: _Results) -> None:
    """Draws, cancels, and shows what was drawn before."""
    current = gr.State(None)
    names, most = list(inputs.settings), studio.max_references
    outputs = [results.status, results.preview, results.video, *results.files, results.how, results.about]

    def draw(prompt: str, pictures: list[Path], *values: Any) -> Iterator[dict[Any, Any]]:
        yield {inputs.draw: gr.Button(interactive=False)}
        settings = dict(zip(names, values[most:-1], strict=True))
        try:
            job = studio.ask(prompt, list(zip(pictures, values, strict=False)), settings, values[-1] or 0)
        except Exception as error:  # one sentence, and the page goes on
            yield {results.status: _wrong(studio.explain(error, pictures))}
            return
        running = {inputs.draw: gr.Button(visible=False), inputs.cancel: gr.Button(visible=True)}
        yield {current: job, results.preview: gr.Image(value=None, visible=False), **running}
        step = 0
        for shown in studio.updates(job):
            update: dict[Any, Any] = {results.status: _says(shown)}
            if shown.preview is not None and shown.step != step:
                step, label = shown.step, f"Preview: the first frame, estimated after step {shown.step}"
                update[results.preview] = gr.Image(shown.preview, label=label, visible=True)
                update[results.video] = gr.Video(visible=False)
            yield update
        update = {results.preview: gr.Image(value=None, visible=False), results.video: gr.Video(visible=bool(step))}
        yield {**_finished(studio, results), **_show(results, job)} if job.entry else update

    def choose(event: gr.SelectData) -> dict[Any, Any]:
        jobs = studio.finished[::-1]
        return _show(results, jobs[event.index]) if event.index < len(jobs) else {}

    drawn = inputs.draw.click(
        draw,
        [inputs.prompt, inputs.pictures, *inputs.subjects, *inputs.settings.values(), inputs.preview_every],
        [current, inputs.draw, inputs.cancel, *outputs, results.gallery],
        show_progress="hidden",
        api_visibility="private",
    )
    # Gradio drops a click on a button whose last one is still being answered, so it comes back only after that.
    drawn.then(
        lambda: (gr.Button(visible=True, interactive=True), gr.Button(visible=False)),
        None,
        [inputs.draw, inputs.cancel],
        show_progress="hidden",
        api_visibility="private",
    )
    inputs.draw.click(None, js=_TO_STATUS)
    inputs.cancel.click(
        lambda job: studio.cancel(job) if job else None, [current], None, queue=False, api_visibility="private"
    )
    results.gallery.select(choose, None, outputs, show_progress="hidden", api_visibility="private")
    page.load(lambda: _finished(studio, results), None, [results.gallery], api_visibility="private")


def _finished(studio: Studio, results: _Results) -> dict[Any, Any]:
    """The gallery, newest first."""
    items = [(str(job.still), job.request.prompt) for job in studio.finished[::-1]]
    return {results.gallery: gr.Gallery(items, visible=bool(items))}


def _show(results: _Results, job: Job) -> dict[Any, Any]:
    """The result of one job in the place for it."""
    about = job.out.with_suffix(".json")
    return {
        results.preview: gr.Image(value=None, visible=False),
        results.video: gr.Video(str(job.out), visible=True),
        **{
            button: gr.DownloadButton(value=str(file), visible=True)
            for button, file in zip(results.files, (job.out, about), strict=True)
        },
        results.how: gr.Accordion(visible=True),
        results.about: json.dumps(job.entry, indent=1, ensure_ascii=False),
    }


def _says(shown: Shown) -> str:
    """The progress bar and its text."""
    if shown.state == "failed":
        return _wrong(shown.text)
    bar = ""
    if shown.state in ("waiting", "running"):
        percent = round(100 * shown.share)
        bar = (
            f'<div class="bar" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100">'
            f'<div style="width: {percent}%"></div></div>'
        )
    return f'{bar}<p class="says" role="status">{html.escape(shown.text)}</p>'


def _wrong(sentence: str) -> str:
    return f'<p class="wrong" role="alert">{html.escape(sentence)}</p>'


def _small(sentences: Sequence[str]) -> str:
    return "".join(f'<p class="small">{html.escape(sentence)}</p>' for sentence in sentences)


def _read_examples(folder: Path, studio: Studio) -> list[Request]:
    """Prompts and references of a folder of samples; the files are copied to where the page may show them."""
    try:
        entries = read_samples(folder)
    except (ValueError, OSError):
        return []  # what is no folder of samples offers no examples
    found = []
    for entry in [entry for entry in entries if entry.get("references")][:_EXAMPLES]:
        references = []
        for about in entry["references"][: studio.max_references]:
            copy = studio.folder / "examples" / Path(about["image"]).name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / about["image"], copy)
            references.append(Reference(path=copy, subject=about.get("subject")))
        found.append(Request(id=entry["id"], prompt=entry.get("prompt", ""), references=tuple(references)))
    return found
