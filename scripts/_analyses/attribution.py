"""The exact attributions: where in an image the evidence for a class lies, and what each direction contributes."""

import os
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

import numpy as np
from _cli import created

from _analyses.common import Batch, Subject, finish, output_folder
from sequencer.console import table_lines
from sequencer.files import write_arrays, write_csv
from sequencer.printing import printable

if TYPE_CHECKING:
    import torch

MOST_DRAWN = 12  # images in a picture
CURVE_STEPS = 16
RANDOM_MAPS = 4  # per image, for the deletion and insertion curves


def add_arguments(command: ArgumentParser) -> None:
    """Adds MODEL and IMAGES."""
    add = command.add_argument
    add("model", metavar="MODEL", help="run folder, model folder, checkpoint or timm name")
    add("images", metavar="IMAGES", nargs="+", help="files, folders (searched recursively) or glob patterns")


def evidence(args: Namespace) -> int:
    """Writes evidence.png, the maps over the images, evidence.csv and evidence.npz."""
    import torch

    from sequencer.analysis.attribution import evidence_maps, removal_curves
    from sequencer.analysis.attribution_plots import EvidenceRow, plot_evidence

    output = output_folder(args)
    with created(output):
        subject = Subject(args)
        generator = torch.Generator().manual_seed(0)
        table: list[tuple[Any, ...]] = []
        arrays: list[tuple[Any, Any]] = []  # evidence for the predicted class, and against the runner-up
        drawn: list[EvidenceRow] = []
        for batch in subject.batches():
            maps = evidence_maps(subject.model, batch.images)
            first, second = (maps[torch.arange(len(maps)), batch.order[:, i]] for i in (0, 1))
            probabilities = batch.logits.double().softmax(dim=1)
            areas = [_areas(subject, batch, first, removal_curves)]
            noise = [torch.rand(first.shape, generator=generator).to(first.device) for _ in range(RANDOM_MAPS)]
            areas.append(np.mean([_areas(subject, batch, random, removal_curves) for random in noise], axis=0))
            for i, path in enumerate(batch.paths):
                names = subject.named(batch.order[i])
                of_map, of_random = (area[:, i] for area in areas)
                table.append((printable(path), *names, float(probabilities[i, batch.order[i, 0]]), *of_map, *of_random))
                own, margin = first[i].double().cpu().numpy(), (first - second)[i].double().cpu().numpy()
                arrays.append((own, margin))
                if len(drawn) < MOST_DRAWN:
                    title = (os.path.basename(table[-1][0]), f"{names[0]} {table[-1][3]:.1%}")
                    captions = (f"for {names[0]}", f"for {names[0]} against {names[1]}")
                    drawn.append(EvidenceRow(batch.pixels[i], *title, list(zip(captions, arrays[-1], strict=True))))
        header = ("image", "predicted", "runner_up", "probability", "deletion", "insertion")
        write_csv(output / "evidence.csv", (*header, "random_deletion", "random_insertion"), table)
        predicted, margin = (np.stack(values) for values in zip(*arrays, strict=True))
        images = np.array([row[0] for row in table])
        write_arrays(output / "evidence.npz", {"image": images, "predicted": predicted, "margin": margin})
        plot_evidence(drawn, output / "evidence.png")
    lines = []
    for path, predicted, runner_up, p, deletion, insertion, random_deletion, random_insertion in table[:MOST_DRAWN]:
        curves = (f"{a:.0%} ({b:.0%})" for a, b in ((deletion, random_deletion), (insertion, random_insertion)))
        lines.append([os.path.basename(path), f"{predicted} {p:.1%}", runner_up, *curves])
    shown = table_lines(("image", "predicted", "runner-up", "deletion", "insertion"), lines)
    if len(table) > MOST_DRAWN:
        shown.append(f"the first {MOST_DRAWN} of {len(table):,} images are shown")
    means = np.mean([row[4:] for row in table], axis=0)
    shown += [
        "deletion, insertion: mean probability of the predicted class while the",
        "tokens with the largest evidence are deleted or inserted first; in brackets,",
        "in random order. Means: {0:.1%} ({2:.1%}), {1:.1%} ({3:.1%})".format(*means),
    ]
    return finish(subject.unreadable, shown, [output / f"evidence.{suffix}" for suffix in ("png", "csv", "npz")])


def _areas(subject: Subject, batch: Batch, maps: "torch.Tensor", curves: Any) -> np.ndarray[Any, Any]:
    """Means of the deletion and insertion curves of the predicted classes, `2 B`."""
    found = curves(subject.model, batch.images, maps, batch.order[:, 0], CURVE_STEPS)
    return np.stack([curve.mean(dim=1).double().cpu().numpy() for curve in found])


def directions(args: Namespace) -> int:
    """Writes directions.png, the mean over the images, and directions.csv, a row for each image and part."""
    import torch

    from sequencer.analysis.attribution import contributions, sum_by_source
    from sequencer.analysis.attribution_plots import plot_directions

    output = output_folder(args)
    with created(output):
        subject = Subject(args)
        rows: list[tuple[Any, ...]] = []
        margins = []
        for batch in subject.batches():
            found = contributions(subject.model, batch.images)
            each = torch.arange(len(batch.paths))
            own, other = (found.values[each, :, batch.order[:, i]].double().cpu().numpy() for i in (0, 1))
            for i, path in enumerate(batch.paths):
                margins.append(own[i] - other[i])
                about = (printable(path), *subject.named(batch.order[i]))
                for part, values in zip(found.parts, zip(own[i], margins[-1], strict=True), strict=True):
                    place = ("" if index is None else index for index in part[:2])
                    rows.append((*about, *place, part.source, *values))
        header = ("image", "predicted", "runner_up", "stage", "block", "source", "logit", "margin")
        write_csv(output / "directions.csv", header, rows)
        mean = np.mean(margins, axis=0)
        title = f"Logit of the predicted class above the runner-up, mean over images (number: {len(margins):,})"
        plot_directions(found.parts, mean, title, output / "directions.png")
    sums = sum_by_source(found.parts, mean)
    lines = [[source, f"{value:+.3f}"] for source, value in (sums | {"together": sum(sums.values())}).items()]
    shown = table_lines(("sum over blocks, mean over images", "logit above the runner-up"), lines)
    return finish(subject.unreadable, shown, [output / f"directions.{suffix}" for suffix in ("png", "csv")])
