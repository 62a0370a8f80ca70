"""`dla generate --adapter` and `dla chat`: a session at the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_dla.adapters.files import empty_adapter, read_adapter
from megatron_dla.errors import UserError
from megatron_dla.hf.load import check_backbone, load_backbone, load_tokenizer
from megatron_dla.serving.chat import check_chat
from megatron_dla.serving.generate import Generation, Streamer, check_options
from megatron_dla.serving.load import attach_adapter
from megatron_dla.serving.session import Session
from megatron_dla.serving.session_file import load_session, save_session

COMMANDS = {
    "/reset": "forget everything",
    "/forget": "forget the context, keep the memory",
    "/state": "sizes and norms of the memory",
    "/save [FILE]": "save the session",
    "/quit": "end the chat (as does the end of the input)",
}


def open_session(
    hf_dir: str | Path,
    adapter: str | Path | None,
    session_file: str | Path | None,
    *,
    any_base: bool,
    device: str,
    chat: bool = False,
) -> Session:
    """A new session, or the one in `session_file` if it exists. The weights, which take longest, are read last.

    Args:
        chat: the tokenizer must have a chat template, and one that the adapter can use.

    Raises:
        UserError: anything that does not load or fit; also a session file that could not be written later.
    """
    if session_file is not None and not Path(session_file).resolve().parent.is_dir():
        raise UserError(f"--session {str(session_file)!r}: its directory does not exist: create it first")
    check_backbone(hf_dir)
    tokenizer = load_tokenizer(hf_dir)
    trained = empty_adapter() if adapter is None else read_adapter(adapter)
    if chat:
        check_chat(tokenizer, repr(str(hf_dir)), numbered=trained.config.write == "message")
    model = attach_adapter(load_backbone(hf_dir, device=device), trained, any_base=any_base)
    if session_file is not None and Path(session_file).exists():
        return load_session(session_file, model, tokenizer)
    return Session(model, tokenizer)


def generate_with_memory(
    hf_dir: str | Path,
    prompt: str,
    max_new_tokens: int = 100,
    *,
    adapter: str | Path,
    session_file: str | Path | None = None,
    any_base: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    out: TextIO | None = None,
) -> Generation:
    """Continue `prompt` after what the session has seen, and save the session; output as in `serving.generate`.

    Raises:
        UserError: a bad value; a model, adapter or session that is missing, damaged or of another kind.
    """
    check_options(prompt, max_new_tokens, temperature, top_p, seed)
    session = open_session(hf_dir, adapter, session_file, any_base=any_base, device=device)
    out = sys.stdout if out is None else out
    begin, message = time.perf_counter(), session.next_message
    ids = session.tokenizer(prompt, add_special_tokens=not session.tokens_seen)["input_ids"]
    if not ids:
        raise UserError(f"--prompt {prompt!r} has no tokens: give other text")
    session.append(ids, message)
    out.write(prompt)
    text, count = _stream(session, session.generate(max_new_tokens, **_sampling(temperature, top_p, seed)), out)
    out.write("\n")
    done = Generation(text, count, time.perf_counter() - begin, session.nbytes.cache)
    if session_file is not None:
        save_session(session, session_file)
    print(f"{done}, {_sizes(session)}", file=sys.stderr, flush=True)
    return done


def chat(
    hf_dir: str | Path,
    max_new_tokens: int = 400,
    *,
    adapter: str | Path | None = None,
    session_file: str | Path | None = None,
    any_base: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    lines: TextIO | None = None,
    out: TextIO | None = None,
) -> Session:
    """Answer line after line of `lines` (standard input) until it ends, then save the session. Ctrl-C ends an answer.

    Raises:
        UserError: as `generate_with_memory`. A command that fails is reported and the chat continues.
    """
    check_options("x", max_new_tokens, temperature, top_p, seed)
    session = open_session(hf_dir, adapter, session_file, any_base=any_base, device=device, chat=True)
    if lines is None and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # an invalid byte is one line's error, not the chat's end
    lines, out = lines or sys.stdin, out or sys.stdout
    sampling = _sampling(temperature, top_p, seed)
    terminal = lines.isatty()
    if terminal:
        out.write("".join(f"{name:14}{text}\n" for name, text in COMMANDS.items()))
    while True:
        if terminal:
            out.write("> ")
            out.flush()
        line = lines.readline()
        if not line or line.strip() == "/quit":
            break
        if not line.strip():
            continue
        try:
            _check_text(line)
            if line.startswith("/"):
                _command(session, line.split(), session_file, out)
            else:
                _stream(session, session.reply(line.strip(), max_new_tokens, **sampling), out)
                out.write(f"\n[{_sizes(session)}]\n")
        except UserError as error:
            out.write(f"{error}\n")
        except KeyboardInterrupt:
            out.write("\n[stopped]\n")
        out.flush()
    if session_file is not None:
        save_session(session, session_file)
    return session


def _command(session: Session, words: list[str], session_file: str | Path | None, out: TextIO) -> None:
    match words:
        case ["/reset"]:
            session.reset()
        case ["/forget"]:
            if session.history:  # the tokens that end the last answer belong to the memory
                session.feed(session.history, generation_prompt=False)
            session.forget_context()
        case ["/save", *files] if len(files) <= 1:
            path = files[0] if files else session_file
            if path is None:
                raise UserError("/save: give a file")
            save_session(session, path)
            out.write(f"saved {path}\n")
        case ["/state"]:
            for layer, state in session.states.items():
                out.write(f"layer {layer}: norm {state.S.norm().item():.4g}\n")
        case _:
            raise UserError(f"{' '.join(words)}: unknown command, use " + ", ".join(COMMANDS))
    out.write(f"[{_sizes(session)}]\n")


def _check_text(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise UserError("this line is not valid UTF-8 text: check the terminal's encoding") from error


def _sampling(temperature: float, top_p: float, seed: int) -> dict[str, Any]:
    return {"temperature": temperature, "top_p": top_p, "generator": torch.Generator().manual_seed(seed)}


def _stream(session: Session, tokens: Generator[int], out: TextIO) -> tuple[str, int]:
    """Print tokens as they are generated; returns the text and the number of tokens."""
    streamer, count = Streamer(session.tokenizer, out), 0
    streamer.prompt = False
    try:
        for token in tokens:
            streamer.put(torch.tensor([token]))
            count += 1
    finally:
        tokens.close()  # adds an interrupted answer to the history now, not when it is collected
    streamer.end()
    return streamer.text, count


def _sizes(session: Session) -> str:
    size = session.nbytes
    return (
        f"state {size.state} bytes after {session.tokens_seen} tokens, "
        f"KV cache {size.cache} bytes of {len(session.ids)} tokens"
    )
