"""The console command `rb-noisy`: train, publish and models, and those of `rb_noisy.commands`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rb_noisy.commands.annotate import annotate
from rb_noisy.commands.corrections import apply_corrections
from rb_noisy.commands.figures import figures
from rb_noisy.commands.label_issues import label_issues
from rb_noisy.commands.settings import parse_settings
from rb_noisy.commands.sweep import sweep
from rb_noisy.console import ZooOption, console, progress_bar, user_errors
from rb_noisy.device import keep_freed_memory
from rb_noisy.errors import InputError
from rb_noisy.hints import command_line

app = typer.Typer(
    help="Adversarial training when labels are wrong: train, sweep, find wrong labels, annotate, publish.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    callback=keep_freed_memory,
)


app.command("sweep")(sweep)
app.command("label-issues")(label_issues)
app.command("apply-corrections")(apply_corrections)
app.command("annotate")(annotate)
app.command("figures")(figures)


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", help="The run folder to write.")],
    data: Annotated[
        str | None, typer.Option(help="digits, mnist, cifar10, cifar100, cifar100-coarse, npz:FILE or imagefolder:DIR.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="An objective and any parts, e.g. st, pgd-at+sglr, trades+sglr+awp; see the README."),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(help="none, symmetric, uniform, pair, asymmetric, instance, matrix or human:FILE[:SET]."),
    ] = None,
    noise_rate: Annotated[float | None, typer.Option(help="Noise rate, 0 to 1.")] = None,
    backbone: Annotated[str | None, typer.Option(help="A timm name, ours or any.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Length of the run.")] = None,
    seed: Annotated[int | None, typer.Option(help="Initial weights, order, augmentation, random starts.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other recipe field, e.g. --set lr=0.05 (repeatable).")
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Start from a recipe in a JSON file.")] = None,
    like: Annotated[str | None, typer.Option("--like", help="Start from the recipe of a zoo model.")] = None,
    zoo: ZooOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after so many minutes, to be continued with --resume.")
    ] = None,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Within an epoch, save what --resume continues from after so many minutes.")
    ] = 10.0,
    compiled: Annotated[bool, typer.Option("--compile", help="Attack through torch.compile.")] = False,
    threads: Annotated[
        int | None,
        typer.Option(help="Of PyTorch, on a CPU. Default: OMP_NUM_THREADS, else chosen by a short measurement."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Share each step among so many processes of one thread, each with batch_size samples."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="On a CPU, measure first which convolutions are faster as matrix products.")
    ] = False,
    data_root: Annotated[Path | None, typer.Option(help="Where data sets are kept (else $RB_NOISY_DATA).")] = None,
) -> None:
    """Train a model and leave a run folder."""
    from rb_noisy.placement import default_threads, is_main, launched, relaunch
    from rb_noisy.reading import read_bytes
    from rb_noisy.recipes import Recipe, based_on
    from rb_noisy.runs import Run
    from rb_noisy.training import train as run_training

    named = {
        "data": data,
        "method": method,
        "noise": noise,
        "noise_rate": noise_rate,
        "backbone": backbone,
        "epochs": epochs,
        "seed": seed,
    }
    with user_errors():
        if processes is not None and launched() == 1 and processes != 1:
            raise typer.Exit(relaunch(processes, "rb_noisy", sys.argv[1:]))
        console.quiet = not is_main()
        values = {k: v for k, v in named.items() if v is not None} | parse_settings(settings or [])
        if recipe is not None and like is not None:
            raise InputError("both --recipe and --like are given; give one of them")
        if recipe is not None:
            if not recipe.is_file():
                raise InputError(f"--recipe {recipe} is no file; name a JSON file of recipe fields")
            base = Recipe.from_json(read_bytes(recipe, "--recipe", "name a JSON file of recipe fields"), str(recipe))
            values = based_on(base, values)
        elif like is not None:
            from model_zoo.registry import read_card

            card = read_card(like, zoo)
            values = based_on(Recipe.recorded(card["recipe"]), values)
            if threads is None and len(same := card["training"].get("threads", [])) == 1:
                threads = same[0]  # on which its weights depend bit by bit
        elif resume and not values:
            if not (out / "run.json").is_file():
                raise InputError(f"{out} holds no run to resume; check --out, or leave out --resume to begin one")
            values = Run.open(out).recipe.to_dict()
        chosen = Recipe.from_dict(values)
        if chosen.train_size is not None:
            console.print(f"trained on: {chosen.trained_on}", soft_wrap=True)
        with progress_bar() as bar:
            task = bar.add_task("epoch 1", total=None)

            def on_batch(epoch: int, done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, description=f"epoch {epoch + 1}/{chosen.epochs}")

            def on_epoch(line: dict[str, Any]) -> None:
                console.print(_epoch_line(line, chosen.epochs), soft_wrap=True)

            run = run_training(
                chosen,
                out,
                resume,
                checkpoint_minutes=checkpoint_minutes,
                max_minutes=max_minutes,
                compiled=compiled,
                data_root=data_root,
                threads=default_threads() if threads is None else threads,
                tune=tune,
                on_batch=on_batch,
                on_epoch=on_epoch,
                on_note=lambda line: console.print(line, soft_wrap=True),
            )
        if not run.finished:
            console.print(
                f"{out}: stopped after {max_minutes:g} minutes, {len(run.metrics)} of {chosen.epochs} epochs finished; "
                f"continue with: {command_line('rb-noisy', 'train', '--out', out, '--resume')}",
                soft_wrap=True,
            )
            return
        best, final = run.metrics[run.best_epoch], run.metrics[-1]
        console.print(
            f"{out}: best PGD-{chosen.track_steps} {best['test_pgd_acc']:.2%} (epoch {run.best_epoch + 1}), "
            f"final {final['test_pgd_acc']:.2%}; evaluate it with: "
            f"{command_line('python', '-m', 'eval', '--model', out)}",
            soft_wrap=True,
        )


def _epoch_line(line: dict[str, Any], epochs: int) -> str:
    parts = [
        f"epoch {line['epoch'] + 1}/{epochs}",
        f"loss {line['train_loss']:.4f}",
        f"test natural {line['test_natural_acc']:.2%} PGD {line['test_pgd_acc']:.2%}",
        f"κ correct {line['train_correct_kappa']:.2f}",
    ]
    if line["train_incorrect_kappa"] is not None:
        parts.append(f"κ incorrect {line['train_incorrect_kappa']:.2f}")
    return "  ".join([*parts, f"{line['seconds']:.1f} s"])


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    name: Annotated[str, typer.Argument(help="What load_model will take.")],
    zoo: Annotated[str | None, typer.Option(help="The zoo's folder. Default: the one that ships.")] = None,
    checkpoint: Annotated[str, typer.Option(help="final or best.")] = "final",
    half: Annotated[bool, typer.Option("--half", help="Round the weights to half precision: half the bytes.")] = False,
    hub: Annotated[
        str | None, typer.Option(help="USER/REPO on the Hugging Face Hub that large weights are fetched from.")
    ] = None,
    authors: Annotated[str, typer.Option(help="For the card.")] = "",
    link: Annotated[str, typer.Option(help="For the card.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model of that name.")] = False,
) -> None:
    """Publish a run folder into a zoo: its weights and a card."""
    from model_zoo.registry import publish as publish_run

    with user_errors():
        about = {"hub": hub, "authors": authors, "link": link}
        card = publish_run(run, name, zoo=zoo, checkpoint=checkpoint, half=half, overwrite=overwrite, **about)
        # By its place also where it is the zoo that ships: in a checkout, python -m finds the checkout's.
        evaluate = command_line("python", "-m", "eval", "--model", name, "--zoo", zoo or card.parents[3])
        console.print(f"published {card}; evaluate it with: {evaluate}", soft_wrap=True)


@app.command()
def models(
    dataset: Annotated[str | None, typer.Option(help="Only this data set.")] = None,
    noise: Annotated[
        str | None, typer.Option(help="Only this label noise: none, a kind, or a kind with its rate ('symmetric 0.4').")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Only this method.")] = None,
    zoo: ZooOption = None,
) -> None:
    """List the models of a zoo."""
    from model_zoo.registry import choose_cards, dataset_title, noise_title, read_cards

    with user_errors():
        table = Table("model", "data set", "label noise", "method", "backbone", "eps", "natural", "AutoAttack")
        for card in choose_cards(read_cards(zoo), dataset, noise, method):
            table.add_row(
                card["name"],
                dataset_title(card["dataset"]),
                noise_title(card["noise"]),
                card["method"],
                card["architecture"],
                card["eps"],
                card["clean_acc"] or "–",
                card["autoattack_acc"] or "–",
            )
        console.print(table)
