"""Sources: what is decoded, what is refused, and that the way to an image does not change it."""

import io
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from cl_lightning.data import DatasetSource, FileSource, TensorSource
from cl_lightning.data.images import convert, fit, image_files, looks_whole, open_image, pixels
from cl_lightning.data.sources import check_labels, checked, decoded


def picture(width: int = 20, height: int = 12, seed: int = 0, channels: int = 3) -> Image.Image:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8))


def files(folder: Path, images: dict[str, Image.Image], **options: object) -> FileSource:
    paths = []
    for name, image in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        paths.append(path)
    options = {"class_names": ["only"], "root": folder, "size": 8, "name": "test", **options}
    return FileSource(paths, [0] * len(paths), **options)


# ---------------------------------------------------------------------- arrays


def test_the_three_layouts_of_an_array_give_the_same_images():
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    last, first = TensorSource(images, np.zeros(5, int)), TensorSource(images.transpose(0, 3, 1, 2), np.zeros(5, int))
    assert last.image_shape == first.image_shape == (3, 6, 7)
    assert torch.equal(last.images, first.images)
    assert TensorSource(images[..., 0], np.zeros(5, int)).image_shape == (1, 6, 7)


def test_a_digest_depends_on_the_samples_and_not_on_where_they_lie():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
    whole = TensorSource(images, np.zeros(6, int))
    later = TensorSource(np.concatenate([images[:2] + 1, images]), np.zeros(8, int))
    assert whole.digest(np.array([1, 3])) == later.digest(np.array([3, 5]))
    assert whole.digest(np.array([1, 3])) != whole.digest(np.array([3, 1]))


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1], None, "give 3 labels, one per image"),
        ([0, 10**12, 2], None, "label 1000000000000 of sample 1 is outside the range"),
        ([0.0, 0.5, 2.0], None, "the label of sample 1 is 0.5, a value to be predicted"),
        (np.arange(3).astype("timedelta64[s]"), None, "labels are timedelta64"),
        ([0, -1, 2], None, "label -1 of sample 1 is outside the range: negative labels usually mark"),
        (
            [0, 1, 2],
            ["a", "b"],
            "label 2 of sample 2 is outside the range; labels are 0 .. 1, as there are 2 class names",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_their_place(labels, names, message):
    with pytest.raises(ValueError, match=f"data: .*{message}"):
        check_labels(np.array(labels), 3, names, "data")


def test_images_of_another_type_or_shape_are_refused():
    with pytest.raises(ValueError, match=r"float32 from -1 to -1: normalised.*give uint8 pixels from 0 to 255"):
        TensorSource(-torch.ones(2, 4, 4), [0, 0])
    with pytest.raises(ValueError, match=r"shape \(2, 4\); use \(N, H, W\)"):
        TensorSource(torch.zeros(2, 4, dtype=torch.uint8), [0, 0])


# ---------------------------------------------------------------------- decoding


def test_the_shorter_side_is_scaled_and_the_centre_cropped():
    image = picture(40, 20)
    assert torch.equal(fit(image, 20), pixels(image.crop((10, 0, 30, 20))))
    assert torch.equal(fit(image, 10), pixels(image.resize((20, 10), Image.Resampling.BILINEAR).crop((5, 0, 15, 10))))
    tall = image.transpose(Image.Transpose.TRANSPOSE)
    assert torch.equal(fit(tall, 10), fit(image, 10).mT)


def test_an_image_of_the_right_size_is_not_touched():
    image = picture(9, 9)
    assert torch.equal(fit(image, 9), torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (3, 2), (7, 300)])
def test_small_and_narrow_images_are_scaled_up(width, height):
    assert fit(picture(width, height), 32).shape == (3, 32, 32)
    assert (fit(Image.new("RGB", (width, height), (10, 20, 30)), 32) == torch.tensor([10, 20, 30])[:, None, None]).all()


@pytest.mark.parametrize(
    "suffix",
    ["png", "jpg", "jfif", "jpe", "bmp", "dib", "gif", "webp", "tif", "ppm", "jp2", "j2k", "avif", "tga", "pcx", "sgi"],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_known_ending_is_decoded(tmp_path, suffix, mode):
    source = files(tmp_path, {f"a.{suffix}": smooth(40, 30)}, size=16, mode=mode)
    expected = fit(smooth(40, 30).convert(mode), 16)
    image = source.take(torch.tensor([0]))[0]
    assert image.shape == expected.shape == source.image_shape
    assert (image.int() - expected.int()).abs().float().mean() < 6  # JPEG, WebP and the palette of GIF lose a little
    assert checked(source) is source


class Plugin:
    """A package that teaches Pillow to read HEIF: here, files of BMP behind the header of HEIF."""

    @staticmethod
    def register_heif_opener() -> None:
        from PIL import BmpImagePlugin

        Image.register_open(
            "HEIF",
            lambda file, name: BmpImagePlugin.BmpImageFile(io.BytesIO(file.read()[16:])),
            lambda start: start[4:12] == b"ftypheic",
        )


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg"])  # phones and tools rename files
def test_a_plugin_of_pillow_is_loaded_where_a_file_needs_it(tmp_path, monkeypatch, name):
    buffer = io.BytesIO()
    smooth(8, 8).save(buffer, "BMP")
    path = tmp_path / name
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0" + buffer.getvalue())
    assert image_files(tmp_path) == [path]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        for read in (looks_whole, lambda path: open_image(path, "RGB")):
            with pytest.raises(ValueError, match="install pillow-heif, Pillow needs it to read HEIF"):
                read(path)
    opens, ids = dict(Image.OPEN), list(Image.ID)
    monkeypatch.setitem(sys.modules, "pillow_heif", Plugin)
    try:
        assert open_image(path, "RGB").tobytes() == smooth(8, 8).tobytes()
        assert not looks_whole(path)  # cannot be decided: such a file is decoded
    finally:
        Image.OPEN.clear()
        Image.OPEN.update(opens)
        Image.ID[:] = ids


@pytest.mark.parametrize("read", [looks_whole, lambda path: open_image(path, "RGB")])
def test_a_named_pipe_is_refused_without_opening_it(tmp_path, read):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png: not a readable image \(it is a named pipe, not a file\)"):
        read(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png: it is a named pipe, not a file; remove it"):
        image_files(tmp_path)


def test_reasons_are_not_shortened(tmp_path, monkeypatch):
    (tmp_path / "a.png").touch()

    def fail(*_: object, **__: object) -> None:
        raise ValueError("word " * 100 + "end")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match=r"\(word .* end\)$"):
        open_image(tmp_path / "a.png", "RGB")


def test_a_photograph_is_decoded_at_a_fraction_of_its_size_without_a_visible_difference(tmp_path):
    source = files(tmp_path, {"a.jpg": smooth(4000, 3000)}, size=64)
    assert min(open_image(tmp_path / "a.jpg", "RGB", least=128).size) < 400  # an eighth
    exact = fit(open_image(tmp_path / "a.jpg", "RGB"), 64)
    assert (source.decode(tmp_path / "a.jpg").int() - exact.int()).abs().max() <= 3


def test_an_image_is_turned_upright(tmp_path):
    image = smooth(16, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "b.png")
    turned = open_image(tmp_path / "a.png", "RGB")
    assert turned.size == (8, 16)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(open_image(tmp_path / "b.png", "RGB")), -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_image(tmp_path):
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(16, 8).save(data, "JPEG", exif=exif)
    broken = data.getvalue().replace(b"Exif\x00\x00MM\x00*\x00\x00\x00\x08", b"Exif\x00\x00MM\x00*\xff\xff\xff\xf0")
    assert broken != data.getvalue()
    (tmp_path / "a.jpg").write_bytes(broken)
    assert open_image(tmp_path / "a.jpg", "RGB").size == (16, 8)


def test_sixteen_bits_become_eight():
    levels = np.array([[0, 128, 257, 32896, 65535]], dtype=np.uint16)
    assert np.asarray(convert(Image.fromarray(levels), "L")).tolist() == [[0, 0, 1, 128, 255]]
    assert convert(Image.fromarray(levels), "RGB").mode == "RGB"


def test_a_dark_sixteen_bit_file_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 200, dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png", "L")).max() <= 1


def test_pixels_whose_white_is_unknown_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(
        ValueError, match=r"a\.tif: not a readable image \(pixels of mode F; give images of 8 or 16 bits"
    ):
        open_image(tmp_path / "a.tif", "L")


def test_a_palette_is_looked_up_and_transparency_becomes_white(tmp_path):
    palette = picture(8, 8).quantize(16)
    assert torch.equal(pixels(convert(palette, "RGB")), pixels(palette.convert("RGB")))
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(convert(clear, "RGB")).min() == 255
    clear.quantize(4).save(tmp_path / "a.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "a.png", "RGB")).min() == 255


def damaged(kind: str) -> bytes:
    data = io.BytesIO()
    picture(64, 48).save(data, "JPEG" if kind.endswith("jpg") else "PNG")
    whole = data.getvalue()
    return {"empty": b"", "text": b"no image", "half": whole[: len(whole) // 2], "head": whole[:30]}[kind.split("-")[0]]


@pytest.mark.parametrize("kind", ["empty-jpg", "text-jpg", "half-jpg", "head-jpg", "half-png", "head-png"])
def test_a_file_that_is_cut_off_or_no_image_is_named(tmp_path, kind):
    path = tmp_path / f"bild \u00fc.{kind[-3:]}"
    path.write_bytes(damaged(kind))
    with pytest.raises(ValueError, match=r"bild \u00fc.*not a readable image"):
        open_image(path, "RGB")
    source = FileSource([path], [0], class_names=["only"], root=tmp_path, size=8)
    for look in (decoded, checked):
        with pytest.raises(ValueError, match=r"1 of 1 files cannot be read: .*bild \u00fc.*set skip_unreadable"):
            look(source)


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"a\.png: not a readable image \(no such file or directory\)"):
        checked(FileSource([tmp_path / "a.png"], [0], class_names=["only"], root=tmp_path))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PIL, about damaged tags
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_random_damage_is_survived_or_told_with_the_name_of_the_file(tmp_path, format):
    chance, data, named = random.Random(0), io.BytesIO(), []
    smooth(24, 16).save(data, format)
    for _ in range(60):
        broken = bytearray(data.getvalue())
        for _ in range(chance.randint(1, 8)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        path = tmp_path / "broken.img"
        path.write_bytes(broken[: chance.randint(1, len(broken))] if chance.random() < 0.3 else broken)
        for look in (looks_whole, lambda path: open_image(path, "RGB", least=16)):
            try:
                look(path)
            except ValueError as error:
                named.append(str(path) in str(error))
    assert all(named)


def test_unreadable_files_are_left_out_with_their_labels_and_domains(tmp_path):
    images = {f"{index}.png": picture(seed=index) for index in range(5)}
    whole = files(tmp_path, images)
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:-40])
    options = {"class_names": list("abcde"), "root": tmp_path, "size": 8, "name": "test"}
    source = FileSource(
        whole.paths, range(5), domains=np.arange(5) % 2, domain_names=["x", "y"], skip_unreadable=True, **options
    )
    for look in (decoded, checked):
        with pytest.warns(UserWarning, match=r"2 of 5 files cannot be read: .*1\.png.*; .*3\.png.* They are left out"):
            kept = look(source)
        assert kept.labels.tolist() == [0, 2, 4]
        assert kept.domains.tolist() == [0, 0, 0]
        assert torch.equal(kept.take(torch.arange(3)), torch.stack([whole.decode(whole.paths[i]) for i in (0, 2, 4)]))


def test_many_unreadable_files_are_counted_and_all_of_them_are_too_many(tmp_path):
    for index in range(8):
        (tmp_path / f"{index}.png").write_bytes(b"x")
    paths = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"8 of 8 files cannot be read: .*0\.png.*4\.png.*; and 3 more\. Repair"):
        decoded(FileSource(paths, [0] * 8, class_names=["a"], root=tmp_path))
    with pytest.raises(ValueError, match="nothing left to learn from"):
        decoded(FileSource(paths, [0] * 8, class_names=["a"], root=tmp_path, skip_unreadable=True))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_decoding_once_gives_the_same_images_with_any_number_of_threads(tmp_path, threads):
    source = files(tmp_path, {f"{index:03}.png": picture(seed=index) for index in range(150)})
    kept = decoded(source, threads)
    everything = torch.arange(150)
    assert torch.equal(kept.take(everything), source.take(everything))
    assert kept.in_memory
    assert kept.digest(np.arange(7)) == source.digest(np.arange(7))
    assert source.take(everything[:0]).shape == kept.take(everything[:0]).shape == (0, 3, 8, 8)


def test_a_digest_of_files_follows_their_names_and_sizes(tmp_path):
    images = {"a/x.png": picture(seed=0), "a/y.png": picture(seed=1), "b/z.png": picture(seed=2)}
    source, moved = files(tmp_path / "one", images), files(tmp_path / "two", images)
    assert source.digest(np.arange(3)) == moved.digest(np.arange(3))
    more = files(tmp_path / "two", {"a/new.png": picture(), **images})
    assert source.digest(np.array([2])) == more.digest(np.array([3]))
    picture(30, 30).save(tmp_path / "one" / "a" / "x.png")
    assert source.digest(np.arange(3)) != moved.digest(np.arange(3))


def test_own_decoding_gives_the_shape(tmp_path):
    source = files(tmp_path, {"a.png": picture(20, 12)}, load=lambda image: pixels(image.resize((5, 4))))
    assert source.image_shape == (3, 4, 5)
    assert decoded(source).image_shape == (3, 4, 5)
    ragged = files(tmp_path, {"a.png": picture(20, 12), "b.png": picture(12, 20)}, load=pixels)
    with pytest.raises(ValueError, match=r"differ in shape, \(3, 12, 20\) and, item 1, \(3, 20, 12\)"):
        decoded(ragged)


@pytest.mark.parametrize(("option", "message"), [({"size": 0}, "size is 0"), ({"mode": "P"}, "mode is 'P'; use RGB")])
def test_options_of_files_are_checked(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        FileSource([], [], class_names=["a"], root=tmp_path, **option)


# ---------------------------------------------------------------------- folders


def test_images_are_found_in_nested_folders_behind_links_and_with_any_name(tmp_path):
    inside, outside = tmp_path / "class", tmp_path / "elsewhere"
    for name in ("b.PNG", "deep/er/a.jpg", "deep/\u00e9t\u00e9.jpeg", "name with spaces.webp", "folder.png/c.png"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).touch()
    for name in (".hidden.png", ".git/d.png", "notes.txt", "._b.PNG", "no_suffix"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).touch()
    outside.mkdir()
    (outside / "linked.png").touch()
    (inside / "zlink").symlink_to(outside, target_is_directory=True)
    (inside / "deep" / "loop").symlink_to(inside, target_is_directory=True)
    (inside / "single.gif").symlink_to(outside / "linked.png")
    found = [path.relative_to(inside).as_posix() for path in image_files(inside)]
    assert found == [
        "b.PNG",
        "deep/er/a.jpg",
        "deep/\u00e9t\u00e9.jpeg",
        "folder.png/c.png",
        "name with spaces.webp",
        "single.gif",
        "zlink/linked.png",
    ]


# ---------------------------------------------------------------------- data sets of a user


class Items(Dataset):
    def __init__(self, images: list, labels: list, **attributes: object) -> None:
        self.images, self.own = images, labels
        self.reads = 0
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple:
        if index >= len(self.images):
            raise IndexError
        self.reads += 1
        return self.images[index], self.own[index]


def test_labels_are_taken_from_the_attribute_without_reading_items():
    data = Items([picture(), picture()], [1, 0], targets=[1, 0], classes=["cat", "dog"])
    source = DatasetSource(data)
    assert (data.reads, source.labels.tolist(), source.class_names) == (0, [1, 0], ("cat", "dog"))


def test_without_the_attribute_every_item_is_read_once():
    data = Items([picture(), picture()], [torch.tensor(1), np.int64(0)])
    with pytest.warns(UserWarning, match="every item is read once"):
        source = DatasetSource(data)
    assert (data.reads, source.labels.tolist(), source.class_names) == (2, [1, 0], ("0", "1"))


def test_tensors_and_pictures_give_the_same_images():
    images = [picture(6, 5, seed) for seed in range(3)]
    kept = decoded(DatasetSource(Items(images, [0, 1, 0], targets=[0, 1, 0])))
    stacked = torch.stack([pixels(image) for image in images])
    assert torch.equal(kept.images, stacked)
    tensors = DatasetSource(TensorDataset(stacked, torch.tensor([0, 1, 0])))
    assert torch.equal(tensors.take(torch.tensor([2, 0])), stacked[[2, 0]])
    assert tensors.take(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 5, 6)


def test_colours_of_a_palette_are_kept_and_gray_stays_gray():
    palette, gray = picture(8, 8).quantize(16), picture(8, 8, channels=1)
    source = DatasetSource(Items([palette], [0], targets=[0]))
    assert torch.equal(source.image(0), pixels(palette.convert("RGB")))
    assert DatasetSource(Items([gray], [0], targets=[0])).image_shape == (1, 8, 8)
    assert DatasetSource(Items([gray], [0], targets=[0]), mode="RGB", size=4).image_shape == (3, 4, 4)


def test_gray_among_colours_and_other_sizes_are_told_with_the_remedy():
    mixed = Items([picture(8, 8), picture(8, 8, channels=1)], [0, 0], targets=[0, 0])
    for look in (decoded, lambda source: source.take(torch.tensor([0, 1]))):
        with pytest.raises(ValueError, match=r"images differ in shape.*`mode` if only the channels differ"):
            look(DatasetSource(mixed, name="mine"))
        assert look(DatasetSource(mixed, mode="RGB")) is not None
    sizes = Items([picture(8, 8), picture(9, 8)], [0, 0], targets=[0, 0])
    with pytest.raises(ValueError, match="give `size`"):
        decoded(DatasetSource(sizes))
    assert decoded(DatasetSource(sizes, size=4)).image_shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.full((3, 4, 4), -1.0), "item 0 is float32 from -1 to -1: normalised .* applies ToTensor and Normalize"),
        (torch.full((3, 4, 4), 200.0), "item 0 is float32 from 200 to 200: pixels of 0 .. 255 as floating point"),
        (torch.full((3, 4, 4), 0.501), "but no pixels of 8 bits; give the images before they are resized"),
        (torch.zeros(1, 4, 4, dtype=torch.uint16), "item 0 is uint16: images of 16 bits; scale them to 0 .. 255"),
        (torch.full((1, 4, 4), 256), "item 0 is int64 from 256 to 256; give uint8 pixels"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"shape \(2, 3, 4, 4\)"),
        (torch.zeros(20).long(), r"int64 of shape \(20,\), a row of a table; return PIL images .* or give data.inputs"),
        (torch.zeros(2, 100), "a matrix of measurements, such as a series or a spectrogram; return .* data.inputs"),
        (np.zeros((13, 8, 12), np.uint8), "neither the first nor the last side is 1, 3 or 4 channels"),
        ("photo.png", "item 0 is the str 'photo.png'; give"),
        ({"bytes": b"", "path": "a"}, r"item 0 is of the type dict; give \(image, label\), the image a PIL image"),
    ],
)
def test_items_that_are_no_raw_images_are_refused(item, message):
    with pytest.raises(ValueError, match=message):
        decoded(DatasetSource(Items([item], [0], targets=[0])))


def test_a_data_set_without_length_items_or_labels_is_refused():
    with pytest.raises(ValueError, match="has no length"):
        DatasetSource(iter([]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no items"):
        DatasetSource(Items([], []))
    with pytest.raises(ValueError, match="DatasetDict is a dict of 'train', 'test'; give one of these data sets"):
        DatasetSource(type("DatasetDict", (dict,), {})(train=1, test=2))


def test_an_item_that_cannot_be_read_is_told_with_its_place(tmp_path):
    (tmp_path / "a.jpg").write_bytes(damaged("half-jpg"))
    words = r"mine: item 1 cannot be read \(image file is truncated"
    # PIL reads the pixels only when they are asked for.
    with Image.open(tmp_path / "a.jpg") as late, pytest.raises(ValueError, match=words):
        decoded(DatasetSource(Items([picture(64, 48), late], [0, 0], targets=[0, 0]), name="mine"))


def test_domains_of_a_data_set_are_found():
    source = DatasetSource(Items([picture()] * 3, [0] * 3, targets=[0] * 3, domains=[1, 0, 1], domain_names=["a", "b"]))
    assert (source.domains.tolist(), source.domain_names) == ([1, 0, 1], ("a", "b"))


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two processors")
def test_errors_of_a_thread_arrive():
    class Bad(Items):
        def __getitem__(self, index: int) -> tuple:
            if index == 70:
                raise ValueError("item 70 is bad")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match="item 70 is bad"):
        decoded(DatasetSource(Bad([picture()] * 100, [0] * 100, targets=[0] * 100), threads=True))


def test_a_pipe_among_image_files_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for read in (looks_whole, lambda path: open_image(path, "RGB")):
        with pytest.raises(ValueError, match=r"x\.png: not a readable image \(it is a named pipe, not a file\)"):
            read(tmp_path / "x.png")
