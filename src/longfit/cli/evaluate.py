"""``longfit eval RUN``: base against tuned, as a report; or one measure alone, of a run or of a base model."""

from typing import Annotated

import typer

from longfit.cli import measures
from longfit.cli.measures import Asked
from longfit.cli.values import read_bytes, read_tokens
from longfit.errors import ConfigError

TEXT, PASSKEY, DATA_TYPES = "Text (report, ppl, quant)", "Passkey (report, passkey)", "Data types (quant)"


def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or a base model.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[report|ppl|passkey|quant] [section.key=value]...",
            help="report: base against tuned (default for a run). ppl: perplexity by position. passkey: retrieval."
            " quant: what each data type costs a model. Settings of model and data.",
            show_default=False,
        ),
    ] = None,
    *,
    data: Annotated[
        str | None, typer.Option(help="Held-out text, or the haystack of passkeys: a path.", rich_help_panel=TEXT)
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="Tokens read at once; default: what the model takes.", rich_help_panel=TEXT)
    ] = None,
    stride: Annotated[
        str | None, typer.Option(help="Tokens between windows; default: the window.", rich_help_panel=TEXT)
    ] = None,
    convention: Annotated[
        str, typer.Option(help="document or longlora: which tokens are scored.", rich_help_panel=TEXT)
    ] = "document",
    max_tokens: Annotated[
        str | None, typer.Option(help="Use only the first tokens of the text.", rich_help_panel=TEXT)
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="As 4k,8k,16k; default: parts of the context.", rich_help_panel=PASSKEY)
    ] = None,
    depths: Annotated[str, typer.Option(help="Of the key, 0 to 1.", rich_help_panel=PASSKEY)] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int | None, typer.Option(help="In each cell; default: 5.", rich_help_panel=PASSKEY)] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Hide the keys of all depths in one text.", rich_help_panel=PASSKEY)
    ] = False,
    no_passkey: Annotated[
        bool, typer.Option("--no-passkey", help="Leave it out of the report.", rich_help_panel=PASSKEY)
    ] = False,
    types: Annotated[
        str | None,
        typer.Option(help="Of int8,int8_rows,int4,fp4,mxfp4,nvfp4,nf4,quantile.", rich_help_panel=DATA_TYPES),
    ] = None,
    block_sizes: Annotated[str, typer.Option(help="As 32,64,128.", rich_help_panel=DATA_TYPES)] = "64",
    low_rank: Annotated[
        int,
        typer.Option(
            min=0, help="As 16: also with this rank of the error repaired (LoftQ).", rich_help_panel=DATA_TYPES
        ),
    ] = 0,
    budget: Annotated[
        str | None,
        typer.Option(help="As 90MB: which layers deserve 8 bits in a base of NF4.", rich_help_panel=DATA_TYPES),
    ] = None,
    effort: Annotated[float, typer.Option(help="Of the report: 4 reads four times as much.")] = 1.0,
    quant: Annotated[str | None, typer.Option(help="nf4, fp4, int4, int8 or none; default: nf4, or the run's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: what is fast here.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Of a run: best, last or a name. Default: the best.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure whether a model reads further.

    A run directory is enough: base model, context and adapter are read from it. Attention is always exact.
    """
    sizes = {"--window": window, "--stride": stride, "--max-tokens": max_tokens}
    flags = {"--quant": ("model.quant", quant), "--dtype": ("model.dtype", dtype)}
    asked = Asked.read(target, words or [], sizes=sizes, flags=flags, data=data, checkpoint=checkpoint, as_json=as_json)
    cells = [read_tokens("--lengths", part) for part in lengths.split(",")] if lengths else None
    shares = _read_depths(depths)
    if asked.measure == "report":
        measures.report(asked, trials=trials, effort=effort, with_passkey=not no_passkey)
    elif asked.measure == "ppl":
        measures.perplexity(asked, convention=convention)
    elif asked.measure == "passkey":
        measures.passkey(asked, lengths=cells, depths=shares, trials=trials or 5, together=together)
    elif budget is not None:
        measures.quant_plan(asked, budget=read_bytes("--budget", budget))
    else:
        blocks = [read_tokens("--block-sizes", part) for part in block_sizes.split(",")]
        names = types.split(",") if types else None
        measures.quant_error(asked, names=names, block_sizes=blocks, low_rank=low_rank, convention=convention)


def _read_depths(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--depths {text}: must be numbers from 0 to 1, as 0,0.5,1") from None
