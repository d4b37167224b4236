//! What the embedded model does to a picture, through the real program: the asked thing changed, the rest stayed.

use std::{path::Path, process::Command};

use image::{Rgb, RgbImage};
use tempfile::TempDir;

/// The example scene: a red circle and an orange square on a gradient from cyan to white.
fn scene() -> RgbImage {
    image::open(scene_path()).unwrap().into_rgb8()
}

fn scene_path() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images/scene.png")
}

const RED: [u8; 3] = [220, 40, 40];
const ORANGE: [u8; 3] = [245, 140, 30];
const BLUE: [u8; 3] = [40, 80, 215];
const YELLOW: [u8; 3] = [245, 220, 50];

fn edited(prompt: &str) -> RgbImage {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("out.png");
    let status = Command::new(env!("CARGO_BIN_EXE_retouch"))
        .args(["edit", "--seed", "1", "-q", "-o"])
        .arg(&output)
        .arg(scene_path())
        .arg(prompt)
        .status()
        .unwrap();
    assert!(status.success());
    image::open(output).unwrap().into_rgb8()
}

fn distance(Rgb(a): &Rgb<u8>, b: [u8; 3]) -> f64 {
    a.iter().zip(b).map(|(&a, b)| (f64::from(a) - f64::from(b)).powi(2)).sum::<f64>().sqrt()
}

/// The pixels of the scene that have one of these colours, and those farther than `margin` pixels from any of them.
struct Region(Vec<(u32, u32)>);

impl Region {
    fn of(scene: &RgbImage, colour: [u8; 3]) -> Self {
        Self(scene.enumerate_pixels().filter(|(.., p)| distance(p, colour) < 8.0).map(|(x, y, _)| (x, y)).collect())
    }

    /// All pixels at least `margin` away from this region: the model works in patches, and edges are soft.
    fn outside(&self, scene: &RgbImage, margin: i64) -> Self {
        let near = |x: u32, y: u32| {
            self.0.iter().any(|&(a, b)| {
                (i64::from(a) - i64::from(x)).abs() <= margin && (i64::from(b) - i64::from(y)).abs() <= margin
            })
        };
        Self(scene.enumerate_pixels().filter(|&(x, y, _)| !near(x, y)).map(|(x, y, _)| (x, y)).collect())
    }

    fn mean(&self, image: &RgbImage) -> [f64; 3] {
        std::array::from_fn(|c| {
            self.0.iter().map(|&(x, y)| f64::from(image.get_pixel(x, y)[c])).sum::<f64>() / self.0.len() as f64
        })
    }

    /// Peak signal-to-noise ratio of `image` against `scene` over this region, in dB.
    fn psnr(&self, image: &RgbImage, scene: &RgbImage) -> f64 {
        let square = |&(x, y): &(u32, u32)| {
            let (a, b) = (image.get_pixel(x, y), scene.get_pixel(x, y));
            a.0.iter().zip(b.0).map(|(&a, b)| (f64::from(a) - f64::from(b)).powi(2)).sum::<f64>()
        };
        let mean = self.0.iter().map(square).sum::<f64>() / (3 * self.0.len()) as f64;
        10.0 * (255.0f64.powi(2) / mean).log10()
    }
}

/// The nearest of the palette's colours that the assertions are about.
fn nearest(mean: [f64; 3]) -> [u8; 3] {
    const PALETTE: [[u8; 3]; 12] = [
        RED,
        ORANGE,
        YELLOW,
        [40, 165, 70],
        BLUE,
        [130, 50, 180],
        [245, 130, 185],
        [120, 75, 40],
        [20, 20, 20],
        [245, 245, 245],
        [128, 128, 128],
        [50, 205, 215],
    ];
    let mean = Rgb(mean.map(|v| v as u8));
    PALETTE.into_iter().min_by(|&a, &b| distance(&mean, a).total_cmp(&distance(&mean, b))).unwrap()
}

#[test]
fn the_circle_becomes_blue_and_the_rest_stays() {
    let scene = scene();
    let (circle, square) = (Region::of(&scene, RED), Region::of(&scene, ORANGE));
    assert!(circle.0.len() > 1000 && square.0.len() > 1000);
    let result = edited("make the circle blue");
    assert_eq!(nearest(circle.mean(&result)), BLUE);
    assert_eq!(nearest(square.mean(&result)), ORANGE);
    let rest = circle.outside(&scene, 4).psnr(&result, &scene);
    assert!(rest >= 28.0, "{rest} dB");
}

#[test]
fn the_background_changes_behind_the_objects() {
    let scene = scene();
    let (circle, square) = (Region::of(&scene, RED), Region::of(&scene, ORANGE));
    let result = edited("make the background yellow");
    let both = Region([circle.0.clone(), square.0.clone()].concat());
    assert_eq!(nearest(both.outside(&scene, 4).mean(&result)), YELLOW);
    assert_eq!(nearest(circle.mean(&result)), RED);
    assert_eq!(nearest(square.mean(&result)), ORANGE);
}

#[test]
fn a_removed_square_leaves_the_background() {
    let scene = scene();
    let square = Region::of(&scene, ORANGE);
    let result = edited("get rid of the square");
    // The gradient is between cyan and white there: far from orange in blue.
    let [_, _, blue] = square.mean(&result);
    assert!(blue > 180.0, "{blue}");
    let rest = square.outside(&scene, 4).psnr(&result, &scene);
    assert!(rest >= 28.0, "{rest} dB");
}

#[test]
fn inverting_inverts_every_colour() {
    let scene = scene();
    let all = Region(scene.enumerate_pixels().map(|(x, y, _)| (x, y)).collect());
    let inverted =
        RgbImage::from_fn(scene.width(), scene.height(), |x, y| Rgb(scene.get_pixel(x, y).0.map(|v| 255 - v)));
    let psnr = all.psnr(&edited("invert the colours"), &inverted);
    assert!(psnr >= 20.0, "{psnr} dB");
}
