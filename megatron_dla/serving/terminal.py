"""`dla generate --adapter` and `dla chat`: a session at the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import TextIO

from megatron_dla.adapters.files import empty_adapter, read_adapter
from megatron_dla.errors import UserError
from megatron_dla.hf.load import check_backbone, load_backbone, load_tokenizer
from megatron_dla.serving.chat import check_chat
from megatron_dla.serving.generate import Cost
from megatron_dla.serving.load import attach_adapter
from megatron_dla.serving.sampling import Sampling, check_prompt, cpu_threads
from megatron_dla.serving.session import Session
from megatron_dla.serving.session_file import load_session, save_session
from megatron_dla.serving.stream import TextStream

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
    sampling: Sampling | None = None,
    *,
    adapter: str | Path,
    session_file: str | Path | None = None,
    any_base: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    out: TextIO | None = None,
) -> str:
    """Continue `prompt` after what the session has seen, and save the session; returns the text.

    It is streamed to `out` (standard output), and a line of rates to standard error.

    Raises:
        UserError: a bad value; a model, adapter or session that is missing, damaged or of another kind.
    """
    check_prompt(prompt)
    sampling = sampling or Sampling()
    session = open_session(hf_dir, adapter, session_file, any_base=any_base, device=device)
    out = sys.stdout if out is None else out
    ids = session.tokenizer(prompt, add_special_tokens=not session.tokens_seen)["input_ids"]
    if not ids:
        raise UserError(f"--prompt {prompt!r} has no tokens: give other text")
    with cpu_threads(session.model.base, threads):
        begin = time.perf_counter()
        session.append(ids, session.next_message)
        read = time.perf_counter()
        out.write(prompt)
        stream = _stream(session, session.generate(sampling.max_new_tokens, **sampling.for_session()), sampling, out)
    out.write("\n")
    seconds = time.perf_counter() - read
    if session_file is not None:
        save_session(session, session_file)
    cost = Cost(len(ids), len(stream.ids), 0, read - begin, seconds, session.nbytes.cache)  # the prefill gives no token
    print(f"{cost}, {_sizes(session)}", file=sys.stderr, flush=True)
    return stream.text


def chat(
    hf_dir: str | Path,
    sampling: Sampling | None = None,
    *,
    adapter: str | Path | None = None,
    session_file: str | Path | None = None,
    any_base: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    lines: TextIO | None = None,
    out: TextIO | None = None,
) -> Session:
    """Answer line after line of `lines` (standard input) until it ends, then save the session. Ctrl-C ends an answer.

    Raises:
        UserError: as `generate_with_memory`. A command that fails is reported and the chat continues.
    """
    sampling = sampling or Sampling(max_new_tokens=400)
    session = open_session(hf_dir, adapter, session_file, any_base=any_base, device=device, chat=True)
    if lines is None and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # an invalid byte is one line's error, not the chat's end
    lines, out = lines or sys.stdin, out or sys.stdout
    options = sampling.for_session()
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
            check_prompt(line, "this line")
            if line.startswith("/"):
                _command(session, line.split(), session_file, out)
            else:
                with cpu_threads(session.model.base, threads):
                    _stream(session, session.reply(line.strip(), sampling.max_new_tokens, **options), sampling, out)
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


def _stream(session: Session, tokens: Generator[int], sampling: Sampling, out: TextIO) -> TextStream:
    """Print tokens as they are generated, up to a stop string."""
    stream = TextStream(session.tokenizer, out, sampling.stop)
    try:
        for token in tokens:
            stream.put(token)
            if stream.stopped:
                break
    finally:
        tokens.close()  # adds an interrupted answer to the history now, not when it is collected
    stream.end()
    return stream


def _sizes(session: Session) -> str:
    size = session.nbytes
    return (
        f"state {size.state} bytes after {session.tokens_seen} tokens, "
        f"KV cache {size.cache} bytes of {len(session.ids)} tokens"
    )
