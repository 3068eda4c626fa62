"""Miniature trees in the real layout of each set, for the tests of the adapters. No row or pixel is a published one."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

N = 24
CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
CHEXPERT = CHEXPERT_HEADER.split(",")
NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
HAM = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "dataset"]
ISIC = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
KVASIR = (
    *("dyed-lifted-polyps", "dyed-resection-margins", "esophagitis", "normal-cecum"),
    *("normal-pylorus", "normal-z-line", "polyps", "ulcerative-colitis"),
)


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 32), mode: str = "L") -> Path:
    """A file with pixels of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def edit(path: Path, row: int, old: str, new: str) -> None:
    """Change the text of one data row (1-based; of a list without a header: count one less)."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert old in lines[row], (lines[row], old)
    lines[row] = lines[row].replace(old, new, 1)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def chexpert(root: Path) -> Path:
    for part, first, n in (("train", 1, N), ("valid", 90001, 6)):
        rows = []
        for i in range(n):
            name = f"CheXpert-v1.0-small/{part}/patient{first + i // 2:05d}/study1/view{i % 2 + 1}_frontal.jpg"
            picture(root / Path(name).relative_to("CheXpert-v1.0-small"), first + i)
            labels = ["1.0" if (i // 2 + k) % 3 == 0 else "0.0" for k in range(14)]
            rows.append([name, "Female" if i % 2 else "Male", 40 + i, "Frontal", "AP", *labels])
        write_csv(root / f"{part}.csv", CHEXPERT, rows)
    return root


def nih14(root: Path) -> Path:
    findings = ["No Finding", "Atelectasis|Hernia", "Mass", "Cardiomegaly"]
    lines, names = [NIH], []
    for i in range(N):
        name = f"{i // 2 + 1:08d}_{i % 2:03d}.png"
        picture(root / f"images_00{1 + i % 2}" / "images" / name, i)
        lines.append(
            f"{name},{findings[i // 2 % 4]},{i % 2},{i // 2 + 1},{50 + i},{'MF'[i % 2]},PA,2682,2749,0.143,0.143"
        )
        names.append(name)
    (root / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")
    (root / "train_val_list.txt").write_text("\n".join(names[:16]) + "\n")
    (root / "test_list.txt").write_text("\n".join(names[16:]) + "\n")
    return root


def ham10000(root: Path) -> Path:
    classes = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    rows = []
    for i in range(28):
        picture(root / f"HAM10000_images_part_{1 + i % 2}" / f"ISIC_{i:07d}.jpg", i, mode="RGB")
        site = ("rosendahl", "vidir_modern")[i // 2 % 2]
        rows.append([f"HAM_{i // 2:07d}", f"ISIC_{i:07d}", classes[i // 2 % 7], "histo", 45.0, "male", "back", site])
    write_csv(root / "HAM10000_metadata.csv", HAM, rows)
    return root


def one_hot(i: int, n: int) -> list[str]:
    return ["1.0" if i == k else "0.0" for k in range(n)]


def isic2018(root: Path) -> Path:
    header = ["image", "MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
    for p, part in enumerate(("Training", "Validation", "Test")):
        rows = []
        for i in range(14):
            name = f"ISIC_{1000 * p + i:07d}"
            picture(root / f"ISIC2018_Task3_{part}_Input" / f"{name}.jpg", 1000 * p + i, mode="RGB")
            rows.append([name, *one_hot(i % 7, 7)])
        folder = root / f"ISIC2018_Task3_{part}_GroundTruth"
        write_csv(folder / f"ISIC2018_Task3_{part}_GroundTruth.csv", header, rows)
    return root


def isic2019(root: Path) -> Path:
    truth, meta = [], []
    for i in range(32):
        name = f"ISIC_{i:07d}" + ("_downsampled" if i % 5 == 0 else "")
        picture(root / "ISIC_2019_Training_Input" / f"{name}.jpg", i, mode="RGB")
        truth.append([name, *one_hot(i // 2 % 8, 9)])
        lesion = "" if i >= 28 else f"{('BCN', 'HAM', 'MSK4')[i // 2 % 3]}_{i // 2:07d}"
        meta.append([name, 50 + i, "anterior torso", lesion, "female"])
    write_csv(root / "ISIC_2019_Training_GroundTruth.csv", ["image", *ISIC], truth)
    write_csv(
        root / "ISIC_2019_Training_Metadata.csv",
        ["image", "age_approx", "anatom_site_general", "lesion_id", "gender"],
        meta,
    )
    return root


def fed_isic2019(root: Path) -> Path:
    isic2019(root)
    rows = []
    for i in range(28):
        name = f"ISIC_{i:07d}" + ("_downsampled" if i % 5 == 0 else "")
        fold = "train" if i % 4 else "test"  # the two images of a lesion are torn apart, as published
        target, centre = i // 2 % 8, i // 2 % 6
        rows.append([name, *one_hot(target, 9), target, centre, fold, f"{fold}_{centre}"])
    header = ["image", *ISIC, "target", "center", "fold", "fold2"]
    write_csv(root / "train_test_split.csv", header, rows)
    return root


def covidx(root: Path) -> Path:
    words = ("normal", "pneumonia", "COVID-19")
    for part, first in (("train", 0), ("test", 100)):
        lines = []
        for i in range(18):
            name = f"{part}{i}.png"
            picture(root / part / name, first + i)
            patient, source = f"{first + i // 2}", ("rsna", "rnsa", "sirm")[i % 3]
            ending = f" {source}" if i % 2 else ""
            lines.append(f"{patient} {name} {words[i // 2 % 3]}{ending}")
        lines[4] = f"COVID {first + 4} {part}4.png COVID-19 sirm"
        (root / f"{part}_COVIDx9A.txt").write_text("\n".join(lines) + "\n")
    return root


def folders(root: Path, places: Sequence[str], names: Callable[[int], str], mode: str, each: int = 6) -> Path:
    for k, place in enumerate(places):
        for i in range(each):
            picture(root / place / names(i), 100 * k + i, mode=mode)
    return root


def kvasir(root: Path) -> Path:
    return folders(root, KVASIR, lambda i: f"{i:04d}.jpg", "RGB")


def covid19_radiography(root: Path) -> Path:
    places = [f"{name}/images" for name in ("COVID", "Normal", "Lung_Opacity", "Viral Pneumonia")]
    folders(root, places, lambda i: f"image-{i}.png", "L")
    picture(root / "COVID" / "masks" / "image-0.png", 999)  # not an image of the set
    return root


def covid19_ct(root: Path) -> Path:
    folders(root, ["CT_COVID", "CT_NonCOVID"], lambda i: f"{i}.png", "RGB", 10)
    for word in ("COVID", "NonCOVID"):
        for part, names in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 10))):
            path = root / "Data-split" / word / f"{part}CT_{word}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{i}.png\n" for i in names))
    return root


def kermany(root: Path) -> Path:
    for p, part in enumerate(("train", "val", "test")):
        for i in range(8):
            cause = ("bacteria", "virus")[i % 2]
            picture(root / part / "PNEUMONIA" / f"person{20 * p + i // 2}_{cause}_{i}.jpeg", 100 * p + i)
            picture(root / part / "NORMAL" / f"IM-{20 * p + i // 2:04d}-{i:04d}.jpeg", 100 * p + 50 + i)
    return root


def diabetic_retinopathy(root: Path) -> Path:
    rows = []
    for i in range(30):
        name = f"{i // 2}_{('left', 'right')[i % 2]}"
        picture(root / "train" / f"{name}.jpeg", i, mode="RGB")
        rows.append([name, i // 2 % 5])
    write_csv(root / "trainLabels.csv", ["image", "level"], rows)
    return root


def imagefolder(root: Path) -> Path:
    places = [f"{part}/{name}" for part in ("train", "val", "test") for name in ("benign", "malignant")]
    folders(root, places, lambda i: f"{i}.png", "RGB")
    rows = [[f"{place}/{i}.png", f"{place.partition('/')[0]}-{i // 2}", "A"] for place in places for i in range(6)]
    write_csv(root / "metadata.csv", ["file", "patient", "site"], rows)
    return root


def own_csv(root: Path) -> Path:
    rows = []
    for i in range(N):
        picture(root / "pictures" / f"{i}.png", i)
        part = "train" if i < 16 else "val" if i < 20 else "test"
        rows.append([f"pictures/{i}.png", ("no", "yes")[i // 2 % 2], f"p{i // 2}", "AB"[i // 2 % 2], part])
    write_csv(root / "labels.csv", ["file", "label", "patient", "site", "split"], rows)
    return root


def rsna_breast(root: Path) -> Path:
    rows = []
    for i in range(N):
        picture(root / "train_images" / str(i // 2) / f"{i}.png", i)
        rows.append([1 + i // 2 % 2, i // 2, i, "L", "CC", 60, int(i // 2 % 4 == 0), 0, 0, "", 0, "", 49, False])
    header = "site_id,patient_id,image_id,laterality,view,age,cancer,biopsy,invasive,BIRADS,implant,density,machine_id"
    write_csv(root / "train.csv", [*header.split(","), "difficult_negative_case"], rows)
    return root


def rsna_pneumonia(root: Path) -> Path:
    rows = []
    for i in range(N):
        picture(root / "stage_2_train_images" / f"p{i}.png", i)
        rows.append([f"p{i}", "", "", "", "", 0] if i % 2 else [f"p{i}", 1, 2, 3, 4, 1])
        if i % 4 == 0:
            rows.append([f"p{i}", 5, 6, 7, 8, 1])
    write_csv(root / "stage_2_train_labels.csv", ["patientId", "x", "y", "width", "height", "Target"], rows)
    return root


@dataclass(frozen=True)
class Tree:
    """How a set's miniature is made, and what is broken in the table of bad inputs."""

    make: Callable[[Path], Path]
    images: int
    channels: int
    table: str = ""
    """The label file."""
    column: str = ""
    """A column that must be there."""
    picture: str = ""
    """One image file, and the data row that lists it."""
    row: int = 0
    label: tuple[int, str, str, str] | None = None
    """Row, text and replacement that give a label outside its range, and the code."""
    leak: tuple[int, str, str] | None = None
    """Row, text and replacement that put a patient into two parts."""


TREES = {
    "chexpert": Tree(
        chexpert, 30, 1, "train.csv", "Edema", "train/patient00002/study1/view2_frontal.jpg", 4,
        (4, ",AP,0.0", ",AP,7.0", "D06"), (4, "patient00002/study1/view2", "patient00002/study1/view2"),
    ),
    "nih14": Tree(
        nih14, 24, 1, "Data_Entry_2017.csv", "Finding Labels", "images_002/images/00000002_001.png", 4,
        (4, "Atelectasis|Hernia", "Atelectasis|Hernya", "D05"), (18, ",9,", ",2,"),
    ),
    "ham10000": Tree(
        ham10000, 28, 3, "HAM10000_metadata.csv", "dx", "HAM10000_images_part_2/ISIC_0000003.jpg", 4,
        (4, ",bcc,", ",bccc,", "D05"),
    ),
    "isic2018": Tree(
        isic2018, 42, 3, "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv", "DF",
        "ISIC2018_Task3_Training_Input/ISIC_0000003.jpg", 4, (4, "1.0", "0.0", "D06"),
    ),
    "isic2019": Tree(
        isic2019, 32, 3, "ISIC_2019_Training_GroundTruth.csv", "SCC", "ISIC_2019_Training_Input/ISIC_0000003.jpg", 4,
        (4, "0.0", "1.0", "D06"),
    ),
    "fed_isic2019": Tree(
        fed_isic2019, 28, 3, "train_test_split.csv", "center", "ISIC_2019_Training_Input/ISIC_0000003.jpg", 4,
        (4, ",train,", ",tren,", "D06"),
    ),
    "covidx": Tree(
        covidx, 36, 1, "train_COVIDx9A.txt", "", "train/train3.png", 4, (3, "pneumonia", "pnomonia", "D05"),
        None,
    ),
    "kvasir": Tree(kvasir, 48, 3, "", "", "dyed-lifted-polyps/0003.jpg", 4),
    "covid19_radiography": Tree(covid19_radiography, 24, 1, "", "", "COVID/images/image-3.png", 4),
    "covid19_ct": Tree(covid19_ct, 20, 1, "", "", "CT_NonCOVID/3.png", 4),
    "kermany": Tree(kermany, 48, 1, "", "", "train/NORMAL/IM-0001-0003.jpeg", 4),
    "diabetic_retinopathy": Tree(
        diabetic_retinopathy, 30, 3, "trainLabels.csv", "level", "train/1_right.jpeg", 4, (4, ",1", ",9", "D06"),
    ),
    "imagefolder": Tree(imagefolder, 36, 3, "metadata.csv", "file", "train/benign/3.png", 16, None,
        (18, "val-2", "train-2"),),
    "csv": Tree(
        own_csv, 24, 1, "labels.csv", "label", "pictures/3.png", 4, None, (18, ",p8,", ",p1,"),
    ),
    "rsna_breast": Tree(
        rsna_breast, 24, 1, "train.csv", "cancer", "train_images/1/3.png", 4, (4, ",60,0,", ",60,5,", "D06"),
    ),
    "rsna_pneumonia": Tree(
        rsna_pneumonia, 24, 1, "stage_2_train_labels.csv", "Target", "stage_2_train_images/p2.png", 4,
        (4, ",4,1", ",4,3", "D06"),
    ),
}  # fmt: skip
