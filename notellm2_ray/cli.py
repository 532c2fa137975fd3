"""The command line: one verb per step, and every setting as ``key=value``.

notellm2 run --preset demo
notellm2 train-embedder --config jobs/configs/world.yaml train.num_workers=2
"""

from __future__ import annotations

import argparse
import logging
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from notellm2_ray import __version__
from notellm2_ray.core.config import below, nested_models, to_plain
from notellm2_ray.core.errors import NoteLLMError
from notellm2_ray.core.settings import Settings
from notellm2_ray.pipeline.sweep_verb import SWEEP_HELP, SWEEP_VERB
from notellm2_ray.pipeline.table import RUNS, STAGES
from notellm2_ray.presets import PRESETS, load_settings


def describe(model: type[BaseModel], prefix: str, own: BaseModel | None = None) -> list[str]:
    """Help lines of the settings below ``prefix``: key, default, explanation.

    Args:
        own: defaults that replace those of ``model``.
    """
    lines = []
    for name, field in model.model_fields.items():
        nested = nested_models(field.annotation)
        if nested:
            if field.default is None:
                lines += [f"  {prefix}{name} = null", *_wrapped(field.description)]
            for inner in nested:
                lines += describe(
                    inner,
                    f"{prefix}{below(name, field.annotation)}",
                    field.default if isinstance(field.default, inner) else None,
                )
        else:
            value = field.default if own is None else getattr(own, name)
            fixed = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            if field.is_required() and len(fixed) == 1:  # what chooses these settings
                lines.append(f"  {prefix}{name} = {fixed[0]}")
                continue
            default = "required" if field.is_required() else yaml.safe_dump(_plain(value), default_flow_style=True)
            default = default.replace("\n...", "").strip()
            head = f"  {prefix}{name} = {default}"
            lines.append(head)
            lines += _wrapped(field.description)
    return lines


def _wrapped(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", 110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def knobs(sections: Sequence[str]) -> str:
    """The help text of some sections of the settings; of all if ``sections`` is empty."""
    lines: list[str] = []
    for name, field in Settings.model_fields.items():
        if sections and name not in (*sections, "workspace", "seed", "ray"):
            continue
        models = nested_models(field.annotation)
        if not models:
            lines += [f"  {name} = {field.default}", f"      {field.description}"]
        for model in models:
            lines += [
                "",
                f"{name}: {(model.__doc__ or '').strip().splitlines()[0]}",
                *describe(model, below(name, field.annotation)),
            ]
    return "\n".join(lines)


def pipeline_verbs() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Verbs of the pipeline, each with its help and the sections of the settings in its help (none: all)."""
    stages = {stage.verb: (stage.help, stage.sections) for stage in STAGES}
    return {**stages, SWEEP_VERB: (SWEEP_HELP, ("ranking",)), **{run.verb: (run.help, ()) for run in RUNS}}


class _VerbParser(argparse.ArgumentParser):
    """A sub-command whose help ends in its settings; they are collected only when the help is shown."""

    def __init__(self, *, sections: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._sections = sections

    def format_help(self) -> str:
        if self._sections is not None:
            self.epilog = "settings, as key=value:\n" + knobs(self._sections)
        return super().format_help()


def parser() -> argparse.ArgumentParser:
    """The argument parser, one sub-command per verb."""
    top = argparse.ArgumentParser(
        prog="notellm2",
        description="Multimodal note embeddings (NoteLLM-2) and recommendation in words (MLLM-MSR) on Ray.",
        epilog="presets:\n" + "\n".join(f"  {name:14s} {text}" for name, (text, _) in PRESETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"notellm2-ray {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_VerbParser)
    for verb, (text, sections) in pipeline_verbs().items():
        sub = verbs.add_parser(
            verb,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            sections=sections,
            usage=f"notellm2 {verb} [--config FILE] [--preset NAME] [--dry-run] [key=value ...]",
        )
        _common(sub)
        sub.add_argument(
            "--dry-run", action="store_true", help="print the resolved settings and the plan, and do nothing"
        )
    settings = verbs.add_parser("settings", help="print the resolved settings as YAML")
    _common(settings)
    serve = verbs.add_parser(
        "serve",
        help="run the online service and its web page on a workspace",
        description="Serve a workspace: embeddings, similar notes, recommendations, live notes and events, a web page.",
        sections=("serve", "generation"),
    )
    _common(serve)
    keys = verbs.add_parser("keys", help="create or revoke an API key of the service")
    keys.add_argument("action", choices=("create", "revoke"))
    keys.add_argument("name", help="name of the key's owner")
    keys.add_argument(
        "--scope", action="append", choices=("read", "write"), help="what a new key may do; may be repeated"
    )
    _common(keys)
    haproxy = verbs.add_parser(
        "haproxy",
        help="write the script that runs HAProxy in a cluster, and print the variables that Ray needs at its start",
        description='Before `ray start`, on every node: eval "$(notellm2 haproxy DIRECTORY --config FILE)". HAProxy '
        "then refuses what the replicas have no room for, and keeps its own ports to the machine.",
        sections=("serve",),
    )
    haproxy.add_argument("directory", type=Path, help="for the script and its files; the same on every node")
    _common(haproxy)
    lift = verbs.add_parser(
        "lift",
        help="compare the arms of the service's experiment by their clicks",
        description="Users, exposures and clicks of each arm of serve.experiment, and its lift over the first arm.",
    )
    _common(lift)
    swap = verbs.add_parser(
        "swap-embedder",
        help="switch the running service to another embedder",
        description="Embed every served note with the embedder that the settings name, then switch the service to the "
        "new vectors, including notes that were added meanwhile. The service stays up throughout.",
        sections=("model", "embed"),
    )
    _common(swap)
    export = verbs.add_parser(
        "export-model",
        help="copy a trained embedder out of the workspace, or upload it to the Hugging Face hub",
        description="Copy or upload the embedder that the settings name, with its model card. Both "
        "notellm2_ray.NoteEncoder and SentenceTransformer load the result.",
        sections=("model",),
    )
    export.add_argument("--output", metavar="DIRECTORY", type=Path, help="new directory to copy it to")
    export.add_argument("--push", metavar="REPOSITORY", help="repository on the hub to upload it to, as in me/notes")
    export.add_argument("--private", action="store_true", help="make a new repository private")
    _common(export)
    verbs.add_parser("doctor", help="list the sockets of Ray and the service that other machines can reach")
    verbs.add_parser("env", help="print versions and devices")
    return top


def _common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", metavar="FILE", help="YAML file of settings; may begin with `preset: NAME`")
    sub.add_argument("--preset", metavar="NAME", help=f"starting point: {', '.join(PRESETS)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``notellm2`` and of every script under ``jobs/``."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    # Overrides may be mixed with options, which argparse does not allow for positionals of a sub-command.
    options.overrides = rest
    for text in rest:
        if text.startswith("-") or "=" not in text:
            top.error(f"unknown argument {text!r}; settings are given as key=value")
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("notellm2_ray").setLevel(logging.INFO)
    # DeepSpeed would report a missing GPU on standard output, where the tables go.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        _dispatch(options)
    except NoteLLMError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues from here")


def _dispatch(options: argparse.Namespace) -> None:
    if options.verb == "env":
        from notellm2_ray.environment import environment

        print(environment())
        return
    if options.verb == "doctor":
        _doctor()
        return
    settings = load_settings(options.config, options.preset, options.overrides)
    if options.verb in ("serve", "keys", "haproxy"):
        _online(options, settings)
        return
    if options.verb == "lift":
        from notellm2_ray.online.lift import lift_report

        print(lift_report(settings))
        return
    if options.verb == "swap-embedder":
        from notellm2_ray.online.swap import swap_embedder

        print(swap_embedder(settings))
        return
    if options.verb == "export-model":
        from notellm2_ray.pipeline.export_model import export_model

        print(export_model(settings, output=options.output, push=options.push, private=options.private))
        return
    if options.verb == "settings":
        print(yaml.safe_dump(to_plain(settings), sort_keys=False, allow_unicode=True), end="")
    elif options.dry_run:
        from notellm2_ray.pipeline.dry_run import dry_run

        print(yaml.safe_dump(to_plain(settings), sort_keys=False, allow_unicode=True))
        print(dry_run(settings, options.verb))
    else:
        from notellm2_ray.pipeline.runs import run_verb

        run_verb(options.verb, settings)


def _online(options: argparse.Namespace, settings: Settings) -> None:
    from notellm2_ray.online import wiring as online

    if options.verb == "serve":
        online.serve_forever(settings)
    elif options.verb == "haproxy":
        print(online.haproxy_script(settings, options.directory))
    elif options.action == "create":
        print(online.create_key(settings, options.name, options.scope or ["read"]))
    else:
        online.revoke_key(settings, options.name)


def _doctor() -> None:
    from notellm2_ray.serve.doctor import examine, report

    finding = examine()
    print(report(finding))
    if finding.problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
