//! Images, and files as they are: a row a file.

use super::*;

#[test]
fn images_are_decoded_and_resized() {
    for name in ["halves.png", "halves.jpg"] {
        let table = rows(Dataset::read_images(fixture(name), [3, 4]));
        assert!(table.column(0).as_string::<i32>().value(0).ends_with(name));
        let image = table.column(1).as_fixed_size_list().value(0);
        let pixels: Vec<_> = image.as_primitive::<UInt8Type>().values().chunks(3).collect();
        assert_eq!(pixels.len(), 12);
        for row in pixels.chunks(4) {
            let near = |pixel: &[u8], color: [u8; 3]| {
                pixel.iter().zip(color).all(|(got, expected)| got.abs_diff(expected) < 60)
            };
            assert!(near(row[0], [255, 0, 0]) && near(row[3], [0, 0, 255]), "{name}: {row:?}");
        }
    }
    // A folder has all images at any depth, in the order of their paths.
    let nested = tempfile::tempdir().expect("folder");
    for (folder, name) in [("b", "halves.JPG"), ("a", "grey.png"), ("a", "notes.txt")] {
        fs::create_dir_all(nested.path().join(folder)).expect("folder");
        let from = fixture(&name.to_lowercase()).replace("notes.txt", "two.npz");
        fs::copy(from, nested.path().join(folder).join(name)).expect("copy");
    }
    let all = Dataset::read_images(nested.path().to_str().expect("UTF-8"), [6, 8]).expect("images");
    let paths = rows(all.select(["path"]));
    let names: Vec<_> = paths.column(0).as_string::<i32>().iter().flatten().collect();
    assert!(names.len() == 2 && names[0].ends_with("a/grey.png"), "{names:?}");
    assert!(names[1].ends_with("b/halves.JPG"), "{names:?}");

    let grey = rows(Dataset::read_images(fixture("grey.png"), [6, 8]));
    let grey = grey.column(1).as_fixed_size_list().value(0);
    assert_eq!(grey.as_primitive::<UInt8Type>().values()[..3], [76, 76, 76]);
}

/// A stream does not go on with other pixels, or with files that went to another folder.
#[test]
fn images_are_told_apart() {
    let dir = tempfile::tempdir().expect("folder");
    for folder in ["cat", "dog"] {
        fs::create_dir(dir.path().join(folder)).expect("folder");
        fs::copy(fixture("grey.png"), dir.path().join(folder).join("1.png")).expect("copy");
    }
    let state = |size| {
        let images = Dataset::read_images(dir.path().to_str().expect("UTF-8"), size);
        let source = images.and_then(|d| d.stream(StreamOptions::unlabelled(["image"])));
        source.expect("stream").open(Shard::ALL).expect("open").state().manifest
    };
    let first = state([4, 2]);
    assert_eq!(state([4, 2]), first);
    assert_ne!(state([2, 4]), first);
    fs::rename(dir.path().join("dog/1.png"), dir.path().join("cat/2.png")).expect("move");
    assert_ne!(state([4, 2]), first);
}

#[test]
fn what_is_no_image_is_named() {
    let whole = fs::read(fixture("halves.png")).expect("read");
    let dir = folder(&[("notes.png", b"no image"), ("cut.png", &whole[..50]), ("empty.png", b"")]);
    for name in ["notes.png", "cut.png", "empty.png"] {
        let text = message(Dataset::read_images(at(&dir, name), [2, 2]).and_then(|d| d.collect()));
        assert!(text.contains(&format!("{name} is not a valid PNG or JPEG file")), "{text}");
    }
    assert!(message(Dataset::read_images(fixture("grey.png"), [0, 2])).contains("0 x 2"));
}

#[test]
fn binary_files_come_as_they_are() {
    let dir = folder(&[("a", b"\0\xff"), ("b.bin", b""), (".hidden", b"x")]);
    // A folder that is being written, or was left behind, is hidden.
    fs::create_dir(dir.path().join(".out.1-2")).expect("folder");
    fs::write(dir.path().join(".out.1-2/part-00000.bin"), b"x").expect("write");
    let table = rows(Dataset::read_binary_files(dir.path().to_str().expect("UTF-8")));
    let bytes: Vec<_> = table.column(1).as_binary::<i32>().iter().flatten().collect();
    assert_eq!(bytes, [&b"\0\xff"[..], b""]);
    let first = table.column(0).as_string::<i32>().value(0);
    assert_eq!(Path::new(first), dir.path().join("a"));
}
