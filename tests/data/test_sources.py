"""Every layout of images and captions that people bring, and which images are held out."""

import io
import json
import os
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldmlab.data.image_sources import Item, Source, list_source, unique_keys, with_fields
from ldmlab.data.splits import SplitRule, split_items, with_class_ids
from ldmlab.errors import InputError


def _image(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def _captions(folder: Path, **options: object) -> list[object]:
    return [item.fields.get("caption") for item in list_source(folder, **options).items]  # type: ignore[arg-type]


def test_jsonl_in_any_language(tmp_path: Path) -> None:
    captions = ["ein Fuß", "红苹果", "тыква\u2028вторая", "🎃"]
    for number in range(4):
        _image(tmp_path / f"images/{number}.png")
    rows = [{"file_name": f"images/{n}.png", "caption": text, "n": n} for n, text in enumerate(captions)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_text(lines, encoding="utf-8")
    source = list_source(tmp_path)
    assert source.layout == "table"
    assert [item.fields["caption"] for item in source.items] == captions
    assert [item.key for item in source.items] == ["0", "1", "2", "3"]
    assert source.items[2].fields["n"] == 2


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_byte_order_mark_and_line_breaks(tmp_path: Path, delimiter: str) -> None:
    _image(tmp_path / "a.png")
    _image(tmp_path / "b.png")
    text = f'image{delimiter}text\r\na.png{delimiter}"two\r\nlines"\r\nb.png{delimiter}été\r\n'
    (tmp_path / "list.csv").write_bytes(text.encode("utf-8-sig"))
    assert _captions(tmp_path) == ["two\nlines", "été"]
    assert list_source(tmp_path / "list.csv").layout == "table"


def test_missing_columns_name_what_was_found(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,title\na.png,hello\n")
    with pytest.raises(InputError, match=r"no column caption or text, it has file_name, title; .*--caption-field"):
        list_source(tmp_path)
    assert _captions(tmp_path, caption="title") == ["hello"]
    assert _captions(tmp_path, caption="none") == [None]
    (tmp_path / "metadata.csv").write_text("bild,caption\na.png,hello\n")
    with pytest.raises(InputError, match=r"it has bild, caption; .*--file-field"):
        list_source(tmp_path)
    assert _captions(tmp_path, file_column="bild") == ["hello"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a"\n', "line 1, is not JSON"),
        ("metadata.jsonl", b"[1]\n", "not an object"),
        ("metadata.csv", b"file_name,caption\na.png,x,y\n", "more cells"),
        ("metadata.csv", "file_name,caption\na.png,été".encode("latin-1"), "not UTF-8"),
        ("metadata.csv", b"file_name,caption\n", "no rows"),
    ],
)
def test_broken_tables(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list_source(tmp_path)


def test_rows_with_faults_and_images_without_row(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    _image(tmp_path / "b.png")
    rows = [
        {"file_name": "a.png", "caption": ["one", "two"]},
        {"caption": "x"},
        {"file_name": "c.png", "caption": None},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = list_source(tmp_path)
    assert source.left_out == 1
    assert source.items[0].fields["caption"] == "one"
    assert source.items[0].fields["captions"] == ["one", "two"]
    assert [item.fault for item in source.items] == [None, "its row names no file", "its row has no caption"]


def test_captions_beside_images(tmp_path: Path) -> None:
    for name in ("a", "sub/a", "sub/b"):
        _image(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("\ufeffköttbullar\n", encoding="utf-8")
    (tmp_path / "sub/a.txt").write_text("soup", encoding="utf-8")
    source = list_source(tmp_path)
    assert source.layout == "captions"
    assert [item.fields["caption"] for item in source.items] == ["köttbullar", "soup", None]
    assert source.items[2].fault == "has no caption file next to it, as --layout captions has"
    assert [item.key for item in source.items] == ["a", "sub_a", "sub_b"]


def test_folder_per_class_is_told_from_nested_plain_folders(tmp_path: Path) -> None:
    for name in ("zebra/1.png", "ape/1.png", "ape/2.png", ".hidden/1.png"):
        _image(tmp_path / "classes" / name)
    source = list_source(tmp_path / "classes")
    assert source.classes == ["ape", "zebra"]
    assert [(item.fields["class"], item.fields["class_id"]) for item in source.items] == [
        ("ape", 0),
        ("ape", 0),
        ("zebra", 1),
    ]
    assert list_source(tmp_path / "classes", layout="plain").classes is None
    for name in ("0/0/a.png", "0/1/a.png", "b.png"):
        _image(tmp_path / "nested" / name)
    assert list_source(tmp_path / "nested").layout == "plain"


def test_tars_as_img2dataset_writes_them(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for number in range(2):
                members = {"jpg": file.getvalue(), "txt": "été".encode(), "json": b'{"url": "u", "status": "success"}'}
                for ending, content in members.items():
                    info = tarfile.TarInfo(f"{shard:05d}{number:04d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    source = list_source(tmp_path)
    assert [item.key for item in source.items] == ["000000000", "000000001", "000010000", "000010001"]
    assert with_fields(source.items[3]).fields == {"url": "u", "status": "success", "caption": "été"}


def test_only_the_images_of_a_list(tmp_path: Path) -> None:
    for name in ("x/1.png", "x/2.png", "y/3.png"):
        _image(tmp_path / "in" / name)
    (tmp_path / "list.txt").write_text("x/2.png\n3.png\n\n")
    assert [item.name for item in list_source(tmp_path / "in", only=tmp_path / "list.txt").items] == [
        "x/2.png",
        "y/3.png",
    ]
    (tmp_path / "list.txt").write_text("4.png\n")
    with pytest.raises(InputError, match=r"does not hold \(4.png\)"):
        list_source(tmp_path / "in", only=tmp_path / "list.txt")


def test_nothing_to_pack(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        list_source(tmp_path / "none")
    with pytest.raises(InputError, match="holds no images"):
        list_source(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(InputError, match="neither a folder nor"):
        list_source(tmp_path / "a.zip")
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("file_name\n")
    with pytest.raises(InputError, match=r"several tables \(a.csv, b.csv\)"):
        list_source(tmp_path)


def test_keys_are_unique_and_plain() -> None:
    names = ["a/x.png", "b/x.png", "a_x.jpg", "b/y.z.png", "b/é.png", "b/ü.png", "b/X.png", "b/" + "l" * 200 + ".png"]
    keys = unique_keys([*names, "a/x.png"])
    assert len({key.lower() for key in keys}) == len(keys)
    assert all(key.replace("_", "").replace("-", "").isalnum() and key.isascii() and len(key) <= 90 for key in keys)
    assert keys[3] == "b_y_z"
    assert unique_keys(["images/a.png", "images/b.png"]) == ["a", "b"]
    assert unique_keys(["/abs/a.png", "b.png"])[1] == "b"


def _item(key: str, **fields: object) -> Item:
    return Item(key, key, key, dict(fields))


def test_split_keeps_groups_together_and_every_stratum_served() -> None:
    tones = ["", *(f"-1f3f{tone}" for tone in "bcdef")]
    items = [_item(f"{n:x}{tone}", code=f"{n:x}{tone}", kind=n % 3) for n in range(60) for tone in tones]
    rule = SplitRule(0.1, "code", "-1f3f[b-f]", "kind", val_least=3)
    sides = split_items(items, rule)
    assert len(sides["val"]) == 9 * 6  # max(10% of 20, 3) groups of six, three times
    assert sorted(item.key for side in sides.values() for item in side) == sorted(item.key for item in items)
    where = defaultdict(set)
    for name, side in sides.items():
        for item in side:
            where[item.key.split("-")[0]].add(name)
    assert all(len(names) == 1 for names in where.values())
    kinds = [item.fields["kind"] for item in sides["val"]]
    assert {kind: kinds.count(kind) for kind in (0, 1, 2)} == {0: 18, 1: 18, 2: 18}


def test_split_depends_on_names_not_on_order() -> None:
    items = [_item(str(number)) for number in range(100)]
    held = {item.key for item in split_items(items, SplitRule(0.2))["val"]}
    assert held == {item.key for item in split_items(items[::-1], SplitRule(0.2))["val"]}
    assert held != {item.key for item in split_items(items, SplitRule(0.2, seed=1))["val"]}
    assert len(held) == 20


def test_split_refusals() -> None:
    with pytest.raises(InputError, match=r"val=1\.5"):
        SplitRule(1.5)
    with pytest.raises(InputError, match=r"split=\.\./x"):
        SplitRule(name="../x")
    with pytest.raises(InputError, match="group-strip"):
        SplitRule(0.1, group_strip="x")
    with pytest.raises(InputError, match="regular expression"):
        SplitRule(0.1, "a", "(")
    with pytest.raises(InputError, match="no field a, its fields are b"):
        split_items([_item("1", b=1)], SplitRule(0.1, "a"))
    with pytest.raises(InputError, match="holds out none"):
        split_items([_item("1", a=1), _item("2", a=1)], SplitRule(0.5, "a"))


def test_class_ids_are_sorted_distinct_values() -> None:
    items, classes = with_class_ids([_item("1", c="b"), _item("2", c="a"), _item("3", c=None), _item("4", c="b")], "c")
    assert classes == ["a", "b"]
    assert [item.fields.get("class_id") for item in items] == [1, 0, None, 1]
    assert items[2].fault == "has no value in field c"


def listed(folder: Path, **options: Any) -> Source:
    return list_source(folder, **options)


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "PNG")


@pytest.mark.parametrize("target", [".", "..", "../..", "in/a"])
def test_every_real_folder_comes_once(tmp_path: Path, target: str) -> None:
    source = tmp_path / "x" / "in"
    put(source, "a/1.png", "a/2.png", "b/c/3.png")
    (source / "loop").symlink_to(os.path.normpath(source / ".." / target) if target == "in/a" else target)
    (source / "b" / "up").symlink_to(source)
    assert [item.name for item in listed(source).items] == ["a/1.png", "a/2.png", "b/c/3.png"]


def test_a_linked_folder_from_elsewhere_is_read(tmp_path: Path) -> None:
    put(tmp_path / "far", "1.png", "deep/2.png")
    put(tmp_path / "in", "0.png")
    (tmp_path / "in" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "same").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "in")
    assert [item.name for item in listed(tmp_path / "in").items] == ["0.png", "far/1.png", "far/deep/2.png"]


def test_what_systems_leave_in_folders_is_no_image(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "._a.png", "__MACOSX/a.png", "__MACOSX/._a.png", ".hidden/b.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"x")
    assert [item.name for item in listed(tmp_path).items] == ["a.png"]


def test_an_image_beside_class_folders(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png", "cover.jpg")
    found = listed(tmp_path)
    assert (found.layout, found.classes, len(found.items)) == ("classes", ["cat", "dog"], 3)
    assert any("cover.jpg" in note and "--layout plain" in note for note in found.notes)
    assert len(listed(tmp_path, layout="plain").items) == 4
    put(tmp_path, *(f"{number}.png" for number in range(5)))
    with pytest.raises(InputError, match=r"--layout classes .* --layout plain"):
        listed(tmp_path)


@pytest.mark.parametrize("ending", ["{}.txt", "{}.TXT", "{}.caption", "{}.CAPTION", "{}.png.txt"])
def test_captions_beside_images_by_any_ending(tmp_path: Path, ending: str) -> None:
    put(tmp_path, "a.png", "B.PNG")
    (tmp_path / ending.format("a")).write_text("first", encoding="utf-8-sig")
    (tmp_path / (ending.format("B") if ".png" not in ending else "B.PNG.txt")).write_text("second")
    found = listed(tmp_path)
    assert found.layout == "captions"
    assert {item.name: item.fields["caption"] for item in found.items} == {"a.png": "first", "B.PNG": "second"}


def test_captions_txt_is_a_table_or_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "captions.txt").write_text("image,caption\na.png,first\nb.png,second\n")
    assert [item.fields["caption"] for item in listed(tmp_path).items] == ["first", "second"]
    (tmp_path / "captions.txt").write_text("a.png first\nb.png second\n")
    found = listed(tmp_path)
    assert found.layout == "plain"
    assert "captions.txt is not read" in found.notes[0]


@pytest.mark.parametrize(
    ("row", "caption"),
    [
        ('{"file_name": "a.png", "caption": NaN}', None),
        ('{"file_name": "a.png", "caption": null}', None),
        ('{"file_name": "a.png", "caption": []}', None),
        ('{"file_name": "a.png", "caption": {"en": "x"}}', None),
        ('{"file_name": "a.png"}', None),
        ('{"file_name": "a.png", "caption": 7}', "7"),
        ('{"file_name": "a.png", "caption": ["x", "y"]}', "x"),
        ('{"file_name": "a.png", "caption": "half \\ud83d"}', "half \ufffd"),
    ],
)
def test_captions_of_a_table_follow_the_rule(tmp_path: Path, row: str, caption: str | None) -> None:
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_text(row + '\n{"file_name": "b.png", "caption": "fine"}\n')
    first, second = listed(tmp_path).items
    assert (first.fields["caption"], second.fields["caption"]) == (caption, "fine")
    assert (first.fault is None) is (caption is not None)
    json.dumps([first.fields, first.fault]).encode()


@pytest.mark.parametrize("spelling", ["{}.png", "./{}.png"])
def test_rows_of_one_image_stay_on_one_side(tmp_path: Path, spelling: str) -> None:
    put(tmp_path, *(f"{number}.png" for number in range(20)))
    rows = [(f"{n}.png" if k % 2 else spelling.format(n), f"{n} {k}") for n in range(20) for k in range(5)]
    lines = [f"{name},{caption}" for name, caption in rows]
    (tmp_path / "metadata.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
    sides = split_items(listed(tmp_path).items, SplitRule(val=0.25))
    images = {side: {item.fields["caption"].split()[0] for item in items} for side, items in sides.items()}
    assert not images["train"] & images["val"]
    assert (len(images["train"]), len(images["val"])) == (15, 5)
    assert {side: len(items) for side, items in sides.items()} == {"train": 75, "val": 25}
