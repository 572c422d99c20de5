"""An animation of a decoding: one HTML file, without any other file or network, that plays the text forward by forward.

A picture (:mod:`raydist.evaluation.trace`) shows when each token of the final text came; only an animation shows what a
sampler replaced, inserted or deleted on the way.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from raydist.evaluation.trace import token_pieces
from raydist.sampling.base import Generation

HIDDEN = "\u2591"  # stands for a token that is still a mask


@dataclass(frozen=True)
class Frame:
    """The text after one forward.

    Attributes:
        forward: counted from 1; 0 before the first.
        tokens: token ids; None where a token is still hidden.
        born: for each token the forward that put it there; 0 for hidden ones and a sampler's start.
    """

    forward: int
    tokens: list[int | None]
    born: list[int]


def frames_of(generation: Generation, *, mask_id: int | None) -> list[Frame]:
    """The frames of a generation, one a forward that changed something.

    Where the sampler recorded its states, tokens are followed from state to state by their longest common runs, so that an
    insertion does not make everything behind it new.
    """
    if generation.states is None:
        return _frames_of_reveals(generation)
    frames = [Frame(0, [], [])]
    for forward, state in enumerate(generation.states, start=1):
        tokens = [None if token == mask_id else token for token in state]
        if tokens != frames[-1].tokens:
            frames.append(Frame(forward, tokens, _born(frames[-1], tokens, forward)))
    return frames


def _frames_of_reveals(generation: Generation) -> list[Frame]:
    frames = []
    for forward in sorted({0, *generation.revealed_at}):
        shown = [at <= forward for at in generation.revealed_at]
        tokens = [token if known else None for token, known in zip(generation.tokens, shown, strict=True)]
        born = [at if known else 0 for at, known in zip(generation.revealed_at, shown, strict=True)]
        frames.append(Frame(forward, tokens, born))
    return frames


def _born(before: Frame, tokens: list[int | None], forward: int) -> list[int]:
    born = [0 if token is None else forward for token in tokens]
    matcher = SequenceMatcher(None, before.tokens, tokens, autojunk=False)
    for start_before, start, length in matcher.get_matching_blocks():
        born[start : start + length] = before.born[start_before : start_before + length]
    return born


def frame_pieces(tokens: Sequence[int | None], *, decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of each token of a frame; :data:`HIDDEN` for a hidden one."""
    pieces: list[str] = []
    run: list[int] = []
    for token in [*tokens, None]:
        if token is not None:
            run.append(token)
            continue
        pieces += [*token_pieces(run, decode=decode), HIDDEN]
        run = []
    return pieces[:-1]


def write_animation(
    generation: Generation,
    *,
    decode: Callable[[Sequence[int]], str],
    mask_id: int | None,
    path: str,
    title: str,
    prompt: str = "",
) -> None:
    """Writes the animation to a local ``.html`` file.

    Args:
        generation: what a sampler returned.
        decode: token ids to text.
        mask_id: shown as hidden.
        path: of the file.
        title: above the text, e.g. the sampler's label.
        prompt: shown before the tokens, in grey.

    Raises:
        OSError: the file cannot be written.
    """
    frames = [
        {"forward": frame.forward, "born": frame.born, "pieces": frame_pieces(frame.tokens, decode=decode)}
        for frame in frames_of(generation, mask_id=mask_id)
    ]
    counts = (
        f"{len(generation.tokens)} tokens in {generation.num_forwards} forwards: "
        f"{generation.tokens_per_forward:.2f} tokens per forward"
    )
    data = json.dumps({"prompt": prompt, "forwards": generation.num_forwards, "frames": frames}).replace("<", "\\u003c")
    page = _PAGE.replace("@TITLE@", html.escape(title)).replace("@COUNTS@", html.escape(counts)).replace("@DATA@", data)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<style>
body { font: 15px/1.3 system-ui, sans-serif; color: #1c262b; max-width: 70em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.1em; margin: 0; }
p { margin: .3em 0; color: #607d8b; font-size: .85em; }
pre { font: 15px/1.7 "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; min-height: 6em; }
pre span { border-radius: 3px; padding: 1px 0; }
pre .prompt { background: #eceff1; }
pre .hidden { color: #b0bec5; }
pre .new { outline: 2px solid #1c262b; }
.bar { display: flex; gap: .8em; align-items: center; }
.bar input { flex: 1; }
</style></head><body>
<h1>@TITLE@</h1>
<p>@COUNTS@</p>
<pre id="text"></pre>
<div class="bar"><button id="play">pause</button>
<input id="slider" type="range" min="0" value="0"><span id="label"></span></div>
<p>colour: the forward that put a token there; outlined: new in this forward; &#9617;: still masked; grey: the prompt</p>
<script>
const data = @DATA@;
const text = document.getElementById("text"), slider = document.getElementById("slider");
const label = document.getElementById("label"), play = document.getElementById("play");
slider.max = data.frames.length - 1;
const colour = forward => `hsl(${250 - 230 * forward / Math.max(1, data.forwards)} 75% 82%)`;
function draw(index) {
  const frame = data.frames[index];
  text.replaceChildren();
  const add = (piece, className, background) => {
    const span = document.createElement("span");
    span.textContent = piece; span.className = className;
    if (background) span.style.background = background;
    text.append(span);
  };
  add(data.prompt, "prompt");
  frame.pieces.forEach((piece, i) => {
    const born = frame.born[i];
    if (born === 0) add(piece, "hidden");
    else add(piece, born === frame.forward ? "new" : "", colour(born));
  });
  label.textContent = `forward ${frame.forward} of ${data.forwards}`;
  slider.value = index;
}
let index = 0, timer = null;
function tick() { index = index + 1 < data.frames.length ? index + 1 : 0; draw(index); }
function toggle() {
  if (timer) { clearInterval(timer); timer = null; } else timer = setInterval(tick, 250);
  play.textContent = timer ? "pause" : "play";
}
play.onclick = toggle;
slider.oninput = () => { if (timer) toggle(); index = Number(slider.value); draw(index); };
draw(0); toggle();
</script></body></html>
"""
