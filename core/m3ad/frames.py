"""Frames: one RGB image with its organized, pixel-registered cloud, from files and from the known data sets.

MVTec 3D-AD and converted Eyecandies: `<category>/{train,validation,test}/<defect|good>/{rgb,xyz,gt}/NNN.*`;
depth images, whose camera's file lies beside or above them, in `depth` instead of `xyz`.
Eyecandies: `<category>/{train,val,test_public}/data/NNN_{image_4,depth,mask}.png` with depth limits and pose.
A hole is a point that is (0, 0, 0), NaN or infinite, or has a number that a bundle declares (`holes`);
`preprocess` alone decides what is foreground.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m3ad.camera import Camera
from m3ad.decode import open_image
from m3ad.errors import FrameError
from m3ad.eyecandies import DEPTH_ENDING, RGB_ENDING
from m3ad.xyz import DEPTH_SUFFIXES, XYZ_SUFFIXES, read_xyz

SPLITS = ("train", "validation", "test")
RGB_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")

EYECANDIES_FOLDERS = {"train": "train", "validation": "val", "test": "test_public"}


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One view of a part.

    Args:
        rgb: [H, W, 3] uint8.
        xyz: [H, W, 3] float32, metres, registered to `rgb` pixel by pixel; holes are (0, 0, 0) or not finite.
        name: what to call it in messages and output files.

    Raises:
        FrameError: a shape or dtype is another, or the two sizes differ.
    """

    rgb: npt.NDArray[np.uint8]
    xyz: npt.NDArray[np.float32]
    name: str

    def __post_init__(self) -> None:
        for label, array, dtype in (("rgb", self.rgb, "uint8"), ("xyz", self.xyz, "float32")):
            if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape or array.dtype != dtype:
                raise FrameError(
                    f"frame {self.name}: {label} is {array.dtype} {list(array.shape)}, "
                    f"expected {dtype} [H, W, 3]"
                )
        if self.rgb.shape != self.xyz.shape:
            (rgb_h, rgb_w), (xyz_h, xyz_w) = self.rgb.shape[:2], self.xyz.shape[:2]
            raise FrameError(
                f"frame {self.name}: the image is {rgb_w}x{rgb_h} pixels but the cloud {xyz_w}x{xyz_h}; "
                "they must be registered pixel by pixel, so export both at the same size"
            )


@dataclass(frozen=True, slots=True)
class Sample:
    """Where one frame lies; `defect` is its folder's name: `good` for a good part, empty when not known."""

    rgb_path: Path
    xyz_path: Path
    mask_path: Path | None
    defect: str
    split: str
    name: str

    @property
    def is_good(self) -> bool:
        """True for a part without defect."""
        return self.defect == "good"


def find_samples(root: Path, split: str) -> list[Sample]:
    """List one split of a category in MVTec 3D-AD or Eyecandies layout, sorted by defect and name.

    Args:
        root: the category's folder.
        split: train, validation or test.

    Raises:
        FrameError: the folder is missing, has neither layout, holds no frames, a file lacks its partner, or a
            part to train on has a defect.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    if not root.is_dir():
        raise FrameError(
            f"{root} is not a folder; name a category's folder, the one that holds train, validation and test"
        )
    eyecandies = root / EYECANDIES_FOLDERS[split] / "data"
    if eyecandies.is_dir():
        samples = _find_eyecandies(eyecandies, split)
        expected = f"NNN{RGB_ENDING} and NNN{DEPTH_ENDING}"
    elif (root / split).is_dir():
        folders = [folder for folder in _visible(root / split) if folder.is_dir()]
        samples = [s for folder in folders for s in _find_mvtec(folder, split)]
        expected = "<good or a defect's name>/rgb/NNN.png and .../xyz/NNN.tiff"
    else:
        categories = [p.name for p in _visible(root) if any((p / s).is_dir() for s in SPLITS)]
        hint = (
            f"it holds the categories {', '.join(categories)}: name one of them"
            if categories
            else (
                f"expected {split}/<good or a defect's name>/{{rgb,xyz}} (MVTec 3D-AD) or "
                f"{EYECANDIES_FOLDERS[split]}/data (Eyecandies)"
            )
        )
        raise FrameError(f"{root} has no split {split!r}; {hint}")
    if not samples:
        raise FrameError(f"{root} holds no frames of the split {split!r}; expected {expected}")
    if bad := [s for s in samples if split != "test" and not s.is_good]:
        raise FrameError(
            f"{bad[0].rgb_path} has the defect {bad[0].defect!r}, but the split {split!r} is for good parts only; "
            "move it to test"
        )
    return samples


def is_category(folder: Path) -> bool:
    """Whether a folder has splits, of either layout."""
    eyecandies = (folder / name / "data" for name in EYECANDIES_FOLDERS.values())
    return any(place.is_dir() for place in (*(folder / name for name in SPLITS), *eyecandies))


def find_pairs(folder: Path) -> list[Sample]:
    """List the frames of a plain folder: `rgb/` and `xyz/` in it, or images and clouds side by side.

    Raises:
        FrameError: the folder is missing, holds no frames, or a file lacks its partner.
    """
    if not folder.is_dir():
        raise FrameError(
            f"{folder} is not a folder; name a folder that holds images and clouds of the same names"
        )
    samples = _find_mvtec(folder, "") if (folder / "rgb").is_dir() else _pair(folder, folder, None, "", "")
    if not samples:
        raise FrameError(
            f"{folder} holds no frames; expected images (png, jpg, bmp, tif, webp) and clouds (tiff, npy, ply, pcd), "
            "or depth images in depth/ beside rgb/, of the same names"
        )
    return samples


def read_sample(sample: Sample, camera: Camera | None = None) -> Frame:
    """Read the frame of a sample; `camera` is of depth images that have no camera's file beside them."""
    name = f"{sample.defect}/{sample.name}".lstrip("/")
    return read_frame(sample.rgb_path, sample.xyz_path, name, camera)


def read_frame(
    rgb_path: Path, xyz_path: Path, name: str | None = None, camera: Camera | None = None
) -> Frame:
    """Read a frame from its two files.

    Args:
        rgb_path: PNG, JPG, BMP, TIFF or WebP, turned as its EXIF tag says; 16-bit colour where it uses the full range.
        xyz_path: TIFF or NPY [H, W, 3] float32 or float64 metres, organized PLY or PCD (row-major, one
            point a pixel, its own grid the image's), an Eyecandies depth PNG with its info and pose files beside it, or
            a depth image (PNG of 16 bits, TIFF, NPY) with its camera's file beside or above it.
        name: the frame's name; the image's file name without its ending when not given.
        camera: of a depth image that has no camera's file.

    Raises:
        FrameError: a file is missing, damaged, of an unknown kind, or not of the expected shape and dtype.
    """
    rgb = _read_rgb(rgb_path)
    return Frame(rgb, read_xyz(xyz_path, (rgb.shape[0], rgb.shape[1]), camera), name or rgb_path.stem)


def read_mask(path: Path, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Read a ground-truth mask; every non-zero pixel is defective.

    Args:
        path: a picture of one channel or several equal ones.
        shape: (H, W) of the frame it belongs to.

    Raises:
        FrameError: the file is missing or damaged, or its size is another.
    """
    pixels = open_image(path)
    mask = np.atleast_3d(pixels).any(axis=2)
    if mask.shape != shape:
        raise FrameError(
            f"mask {path} is {mask.shape[1]}x{mask.shape[0]} pixels, its frame {shape[1]}x{shape[0]}"
        )
    return mask


def read_sample_mask(sample: Sample, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Read a sample's ground truth, [H, W]; all False for a good part.

    Raises:
        FrameError: the sample is not good and has no mask, or the mask cannot be read.
    """
    if sample.is_good:
        return np.zeros(shape, np.bool_)
    if sample.mask_path is None:
        raise FrameError(
            f"{sample.rgb_path} has the defect {sample.defect!r} but no mask; expected gt/{sample.name}.png"
        )
    return read_mask(sample.mask_path, shape)


def _find_mvtec(folder: Path, split: str) -> list[Sample]:
    is_depth = (folder / "depth").is_dir() and not (folder / "xyz").is_dir()
    clouds = folder / ("depth" if is_depth else "xyz")
    return _pair(folder / "rgb", clouds, folder / "gt", folder.name if split else "", split)


def _pair(
    rgb_folder: Path, xyz_folder: Path, gt_folder: Path | None, defect: str, split: str
) -> list[Sample]:
    suffixes: tuple[str, ...] = XYZ_SUFFIXES
    if rgb_folder == xyz_folder:
        images, clouds = _side_by_side(rgb_folder)
    else:
        suffixes = DEPTH_SUFFIXES if xyz_folder.name == "depth" else XYZ_SUFFIXES
        images, clouds = _by_stem(rgb_folder, RGB_SUFFIXES), _by_stem(xyz_folder, suffixes)
    for present, absent, folder, kind in (
        (clouds, images, rgb_folder, f"image ({', '.join(RGB_SUFFIXES)})"),
        (images, clouds, xyz_folder, f"cloud ({', '.join(suffixes)})"),
    ):
        if alone := sorted(present.keys() - absent.keys()):
            count = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise FrameError(f"{present[alone[0]]}{count} has no {kind} of the same name in {folder}")
    masks = _by_stem(gt_folder, MASK_SUFFIXES) if gt_folder else {}
    return [
        Sample(images[stem], clouds[stem], masks.get(stem), defect, split, stem) for stem in sorted(images)
    ]


def _side_by_side(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and clouds of one folder: beside another image a TIFF is the cloud, beside another cloud the image."""
    images = _by_stem(folder, tuple(s for s in RGB_SUFFIXES if s not in XYZ_SUFFIXES))
    clouds = _by_stem(folder, tuple(s for s in XYZ_SUFFIXES if s not in RGB_SUFFIXES))
    for stem, path in _by_stem(folder, tuple(s for s in XYZ_SUFFIXES if s in RGB_SUFFIXES)).items():
        if stem in images and stem in clouds:
            raise FrameError(f"{path} and {clouds[stem].name} have the same name; keep one of them")
        (images if stem in clouds else clouds)[stem] = path
    return images, clouds


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in _visible(folder) if folder.is_dir() else ():
        is_wanted = path.suffix.lower() in suffixes and path.is_file()
        if is_wanted and found.setdefault(path.stem, path) != path:
            raise FrameError(f"{found[path.stem]} and {path.name} have the same name; keep one of them")
    return found


def _visible(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder, sorted; other systems leave `._NAME` and `.DS_Store` behind, which are nobody's frames."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def _find_eyecandies(folder: Path, split: str) -> list[Sample]:
    samples = []
    for rgb_path in _visible(folder, f"*{RGB_ENDING}"):
        name = rgb_path.name.removesuffix(RGB_ENDING)
        depth_path, mask_path = folder / f"{name}{DEPTH_ENDING}", folder / f"{name}_mask.png"
        if not depth_path.is_file():
            raise FrameError(f"{rgb_path} has no {depth_path.name} beside it")
        # Published masks of good parts are black, and only the test split has bad ones.
        bad = split == "test" and mask_path.is_file() and bool(open_image(mask_path).any())
        samples.append(
            Sample(rgb_path, depth_path, mask_path if bad else None, "bad" if bad else "good", split, name)
        )
    return sorted(samples, key=lambda s: (s.defect, s.name))


def _read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    rgb = open_image(path)
    if rgb.dtype == np.uint16 and rgb.ndim == 3:
        return _eight_bits(path, rgb)
    if rgb.dtype not in ("uint8", "bool"):
        raise FrameError(f"{path} is {rgb.dtype} {list(rgb.shape)}, expected an 8-bit RGB or grey image")
    rgb = rgb if rgb.dtype == np.uint8 else rgb.astype(np.uint8) * 255
    return rgb if rgb.ndim == 3 else np.repeat(rgb[:, :, None], 3, axis=2)


def _eight_bits(path: Path, rgb: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """v / 257, rounded, where the highest bit is used; cameras put 10, 12 or 14 bits at the lower end of 16."""
    if (largest := int(rgb.max())) < 1 << 15:
        raise FrameError(
            f"{path} is uint16 {list(rgb.shape)} with no value above {largest}, so how many of its bits count is not "
            "certain; expected an 8-bit RGB or grey image, so export 8 bits or scale it to the full 16"
        )
    return ((np.arange(1 << 16) * 255 + 32767) // 65535).astype(np.uint8)[rgb]
