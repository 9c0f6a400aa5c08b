//! Draws memory in use against the number of guests, with a panel for each workload and a line for each configuration.
//!
//! The font is part of the program, because a server has none.

use std::error::Error;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::{
    BLACK, BitMapBackend, ChartBuilder, Circle, Color, DrawingArea, DrawingBackend,
    IntoDrawingArea, LineSeries, PathElement, RGBColor, SVGBackend, SeriesLabelPosition, WHITE,
};
use plotters::style::{FontStyle, register_font};

use super::{BenchError, Report, Run, Workload};

/// The size of a panel, in pixels.
const SIZE: (u32, u32) = (960, 640);
/// The most labels on the axis of guests.
const X_LABELS: usize = 16;
const FONT: &str = "sans-serif";
/// The colours of Okabe and Ito, which most people can tell apart.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 0, 0),
    RGBColor(213, 94, 0),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(0, 114, 178),
    RGBColor(204, 121, 167),
    RGBColor(150, 150, 150),
];

/// Whether a picture was drawn; the error is of whatever library drew.
type DrawResult = Result<(), Box<dyn Error + Send + Sync>>;

/// The workloads of a report, each once.
fn workloads(report: &Report) -> Vec<Workload> {
    let mut workloads = Vec::new();
    for run in &report.runs {
        if !workloads.contains(&run.workload) {
            workloads.push(run.workload);
        }
    }
    workloads
}

/// Draws `density.svg` and `density.png` in `folder`.
pub(super) fn draw(report: &Report, folder: &Path) -> Result<(), BenchError> {
    static FONTS: Once = Once::new();
    FONTS.call_once(|| {
        // The call fails only if the font is broken; drawing then reports that there is none.
        let _ = register_font(FONT, FontStyle::Normal, dejavu::sans::regular());
    });
    let panels = workloads(report).len().max(1) as u32;
    let size = (SIZE.0 * panels, SIZE.1);
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| BenchError::Plot { path, source }
    };
    let svg = folder.join("density.svg");
    let area = SVGBackend::new(&svg, size).into_drawing_area();
    draw_on(&area, report).map_err(at(&svg))?;
    let png = folder.join("density.png");
    let mut pixels = vec![0; (size.0 * size.1 * 3) as usize];
    let area = BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area();
    draw_on(&area, report).map_err(at(&png))?;
    drop(area);
    encode(&pixels, size, &png).map_err(at(&png))
}

fn encode(pixels: &[u8], (width, height): (u32, u32), path: &Path) -> DrawResult {
    let file = BufWriter::new(File::create(path)?);
    let mut encoder = png::Encoder::new(file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    Ok(writer.finish()?)
}

fn draw_on<B: DrawingBackend>(area: &DrawingArea<B, Shift>, report: &Report) -> DrawResult
where
    B::ErrorType: 'static,
{
    area.fill(&WHITE)?;
    let workloads = workloads(report);
    for (panel, workload) in area
        .split_evenly((1, workloads.len().max(1)))
        .iter()
        .zip(workloads)
    {
        let runs: Vec<_> = report
            .runs
            .iter()
            .filter(|run| run.workload == workload)
            .collect();
        draw_panel(panel, workload, &runs)?;
    }
    Ok(area.present()?)
}

fn draw_panel<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    workload: Workload,
    runs: &[&Run],
) -> DrawResult
where
    B::ErrorType: 'static,
{
    // Guests are whole numbers, so that the axis has no fractions.
    let used: Vec<Vec<_>> = runs
        .iter()
        .map(|run| {
            let guests = run.points.iter().map(|point| point.guests);
            let mib = run.used().into_iter().map(|(_, kib)| kib / 1024.0);
            guests.zip(mib).collect()
        })
        .collect();
    let points = || used.iter().flatten();
    let guests = points()
        .map(|(guests, _)| *guests)
        .max()
        .unwrap_or(1)
        .max(1);
    let mib = points().map(|(_, mib)| *mib).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(
            format!("Host memory in use, workload {workload}"),
            (FONT, 26),
        )
        .margin(16)
        .x_label_area_size(52)
        .y_label_area_size(80)
        .build_cartesian_2d(0..guests, 0.0..mib * 1.08)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc("guests")
        .y_desc("MiB")
        .x_labels(X_LABELS)
        .y_label_formatter(&|mib| format!("{mib:.0}"))
        .label_style((FONT, 18))
        .axis_desc_style((FONT, 20))
        .draw()?;
    for (run, points) in runs.iter().zip(&used) {
        // A configuration has the same colour in every picture.
        let colour = COLOURS[run.configuration as usize % COLOURS.len()];
        let each = run.line.map_or(String::new(), |line| {
            format!(": {:.1} MiB each further guest", line.guest_kib / 1024.0)
        });
        chart
            .draw_series(LineSeries::new(
                points.iter().copied(),
                colour.stroke_width(2),
            ))?
            .label(format!("{}{each}", run.configuration))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], colour.stroke_width(3)));
        let dots = points
            .iter()
            .map(|point| Circle::new(*point, 4, colour.filled()));
        chart.draw_series(dots)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .legend_area_size(32)
        .margin(12)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 18))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn both_pictures_show_every_configuration_on_a_host_without_fonts() {
        let folder = tempfile::tempdir().unwrap();
        draw(&report(), folder.path()).unwrap();
        let svg = std::fs::read_to_string(folder.path().join("density.svg")).unwrap();
        assert!(
            svg.contains("share-off: 26.0 MiB") && svg.contains("qemu-microvm: 110.0 MiB"),
            "{svg}"
        );
        let file = std::io::BufReader::new(File::open(folder.path().join("density.png")).unwrap());
        let mut reader = png::Decoder::new(file).read_info().unwrap();
        assert_eq!((reader.info().width, reader.info().height), SIZE);
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        // The picture has text and lines, and is mostly white.
        let dark = pixels
            .chunks(3)
            .filter(|pixel| pixel.iter().all(|part| *part < 64))
            .count();
        assert!((2000..100_000).contains(&dark), "{dark}");
    }

    #[test]
    fn an_empty_report_is_an_empty_picture() {
        let folder = tempfile::tempdir().unwrap();
        let mut report = report();
        report.runs.clear();
        draw(&report, folder.path()).unwrap();
    }
}
