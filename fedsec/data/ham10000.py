"""How HAM10000, 10,015 dermatoscopic images from four sources, is read: from an npz file or from the usual folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from fedsec.data.adapter import Adapter
from fedsec.data.columns import texts
from fedsec.data.files import ImageFiles, one_of
from fedsec.data.listing import Listing
from fedsec.data.medmnist_table import SetInfo
from fedsec.data.table import Table, read_table

INFO = SetInfo(
    task="multiclass",
    channels=3,
    class_names=("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"),
    licence="CC BY-NC 4.0",
    redistributable=True,
    citation="Tschandl, Rosendahl, Kittler, Scientific Data 5:180161, 2018",
    homepage="https://doi.org/10.7910/DVN/DBW86T",
)
METADATA = ("HAM10000_metadata", "HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata.csv.gz")
REQUIRED = ("lesion_id", "image_id", "dx")
EXTRA = ("dx_type", "localization", "age", "sex")


@dataclass(frozen=True, kw_only=True)
class Ham10000(Adapter):
    """HAM10000 skin lesions (CC BY-NC 4.0), seven classes, four sites: an npz file or the folder of JPEGs."""

    metadata: Annotated[
        str | None, Field(description="the Dataverse table, for the sites that Kaggle's copy lacks")
    ] = None

    info: ClassVar[SetInfo] = INFO
    side: ClassVar[int] = 28
    layout: ClassVar[str] = "HAM10000_metadata.csv beside HAM10000_images_part_1/"

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The metadata table."""
        return one_of(folder, METADATA)

    def read(self, found: Path) -> Listing:
        """One row an image, one lesion for several."""
        table = read_table(found, REQUIRED, (*EXTRA, "dataset"), delimiter=None)
        listing = Listing(found.name, found.parent, rows_read=len(table), digests=[table.digest], id_name="image_id")
        files = ImageFiles(found.parent)
        sites = self._sites(table, listing)
        extra = {name: table.columns[name] for name in EXTRA if name in table.columns}
        ids, lesions, classes = (table.columns[name] for name in ("image_id", "lesion_id", "dx"))
        for i, (image, lesion, dx) in enumerate(zip(ids, lesions, classes, strict=True)):
            path = files.named(image, f"{found}:{i + 1}: image_id")
            if dx.lower() not in INFO.class_names:
                known = ", ".join(INFO.class_names)
                listing.reject(i + 1, "D05", f"'{dx}' is not a class of ham10000 ({known})")
                continue
            label = INFO.class_names.index(dx.lower())
            more = {name: column[i] for name, column in extra.items()}
            listing.add(i + 1, image, path, label, listed=f"{image}.jpg", lesion=lesion, site=sites[i], **more)
        unlisted = len({path.stem for path in files.walk()} - set(ids))
        if unlisted:
            listing.notes.append(f"{unlisted:,} images in the folder are not in {found.name}")
        return listing

    def _sites(self, table: Table, listing: Listing) -> list[str]:
        """The source of each image; what is missing is noted."""
        ids = table.columns["image_id"]
        if self.metadata is not None:
            other = read_table(Path(self.metadata), ("image_id", "dataset"), (), delimiter=None)
            source = dict(zip(other.columns["image_id"], other.columns["dataset"], strict=True))
            found = [source.get(text, "") for text in ids]
        elif "dataset" in table.columns:
            found = table.columns["dataset"]
        else:
            note = f"{table.path.name} has no column 'dataset', so the four natural sites are unknown"
            listing.notes.append(f"{note}; metadata=FILE takes the Dataverse table")
            return [""] * len(ids)
        sites: list[str] = texts(found).tolist()
        if blank := sites.count(""):
            listing.notes.append(f"{blank:,} images are of unknown site")
        return sites
