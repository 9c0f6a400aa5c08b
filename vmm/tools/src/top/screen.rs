//! The content of the terminal, and the keys that change it.

use ratatui::Frame;
use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Cell, Row, Table as Widget};

use super::column::{self, Column, Table};
use super::reading::Reading;

const KEYS: &str = "Left/Right sort  r reverse  f files  Up/Down scroll  q quit";

/// The least width of a name, and the room between columns.
const NAME: usize = 12;
const SPACING: usize = 2;

/// What a key does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyEffect {
    Stay,
    Quit,
}

/// The state of the screen.
#[derive(Debug)]
pub(super) struct Screen {
    reading: Reading,
    sort: Column,
    reverse: bool,
    files: bool,
    /// The number of rows that are scrolled out above.
    above: usize,
}

fn styled(cells: &[String], marked: Option<usize>) -> Row<'_> {
    let cells = cells.iter().enumerate().map(|(at, cell)| {
        let alignment = if at == 0 {
            Alignment::Left
        } else {
            Alignment::Right
        };
        let style = if marked == Some(at) {
            Style::new().add_modifier(Modifier::REVERSED)
        } else {
            Style::new()
        };
        Cell::new(Text::from(cell.as_str()).alignment(alignment)).style(style)
    });
    Row::new(cells)
}

/// The widths of the columns that fit. Names are cut first; figures are shown completely or not at all.
fn fitted(widths: &[usize], room: usize) -> Vec<usize> {
    let mut shown: Vec<_> = widths.iter().copied().take(1).collect();
    let mut used = shown.first().copied().unwrap_or(0).min(NAME);
    for width in widths.iter().skip(1) {
        if used + SPACING + width > room {
            break;
        }
        used += SPACING + width;
        shown.push(*width);
    }
    let figures: usize = shown.iter().skip(1).map(|width| SPACING + width).sum();
    if let Some(name) = shown.first_mut() {
        *name = room.saturating_sub(figures).min(*name);
    }
    shown
}

impl Screen {
    pub(super) fn new(sort: Column, files: bool) -> Self {
        Self {
            reading: Reading::default(),
            sort,
            reverse: false,
            files,
            above: 0,
        }
    }

    /// Shows a new reading.
    pub(super) fn show(&mut self, reading: Reading) {
        self.reading = reading;
        self.arrange();
    }

    fn arrange(&mut self) {
        column::sort(&mut self.reading.guests, self.sort, self.reverse);
        let rows = if self.files {
            self.reading.files.len()
        } else {
            self.reading.guests.len()
        };
        self.above = self.above.min(rows.saturating_sub(1));
    }

    fn sort_by(&mut self, column: Column) {
        (self.sort, self.reverse) = (column, false);
    }

    /// Handles a key or another event of the terminal.
    pub(super) fn handle(&mut self, event: &Event) -> KeyEffect {
        let Event::Key(KeyEvent {
            code,
            modifiers,
            kind: KeyEventKind::Press | KeyEventKind::Repeat,
            ..
        }) = event
        else {
            return KeyEffect::Stay;
        };
        match code {
            KeyCode::Char('q') | KeyCode::Esc => return KeyEffect::Quit,
            KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => {
                return KeyEffect::Quit;
            }
            KeyCode::Left => self.sort_by(self.sort.moved(-1)),
            KeyCode::Right => self.sort_by(self.sort.moved(1)),
            KeyCode::Char('r') => self.reverse = !self.reverse,
            KeyCode::Char('f') => (self.files, self.above) = (!self.files, 0),
            KeyCode::Up => self.above = self.above.saturating_sub(1),
            KeyCode::Down => self.above = self.above.saturating_add(1),
            _ => {}
        }
        self.arrange();
        KeyEffect::Stay
    }

    pub(super) fn draw(&self, frame: &mut Frame<'_>) {
        let table = if self.files {
            Table::of_files(&self.reading.files)
        } else {
            Table::of_guests(&self.reading)
        };
        let sorted = self.sort.heading();
        let marked = table.heading.iter().position(|heading| heading == sorted);
        let all = [&table.heading, &table.totals]
            .into_iter()
            .chain(&table.rows);
        let mut widths = vec![0; table.heading.len()];
        for row in all {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        let shown = fitted(&widths, frame.area().width.into());
        let widths = shown.iter().map(|width| Constraint::Length(*width as u16));
        let [body, keys] =
            Layout::vertical([Constraint::Min(0), Constraint::Length(1)]).areas(frame.area());
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let rows = table.rows.iter().skip(self.above);
        let widget = Widget::new(rows.map(|row| styled(row, None)), widths)
            .header(styled(&table.heading, marked).style(bold))
            .footer(styled(&table.totals, None).style(bold))
            .column_spacing(SPACING as u16);
        frame.render_widget(widget, body);
        frame.render_widget(Line::from(KEYS), keys);
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::column::tests::reading;
    use super::*;

    fn screen() -> Screen {
        let mut screen = Screen::new(Column::Private, false);
        screen.show(reading());
        screen
    }

    /// The lines of the terminal, and the text in reverse video.
    fn shown(screen: &Screen, width: u16) -> (Vec<String>, String) {
        let mut terminal = Terminal::new(TestBackend::new(width, 8)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer();
        let lines = buffer.content().chunks(width.into()).map(|cells| {
            let line: String = cells.iter().map(ratatui::buffer::Cell::symbol).collect();
            line.trim_end().to_owned()
        });
        let marked = buffer
            .content()
            .iter()
            .filter(|cell| cell.modifier.contains(Modifier::REVERSED));
        let marked: String = marked.map(ratatui::buffer::Cell::symbol).collect();
        (lines.collect(), marked.trim().to_owned())
    }

    fn press(screen: &mut Screen, code: KeyCode) -> KeyEffect {
        screen.handle(&Event::Key(KeyEvent::new(code, KeyModifiers::NONE)))
    }

    fn names(screen: &Screen) -> Vec<String> {
        let (lines, _) = shown(screen, 120);
        let rows = lines
            .iter()
            .skip(1)
            .take_while(|line| !line.is_empty() && !line.contains(" guests"));
        rows.map(|line| line.chars().take(1).collect()).collect()
    }

    #[test]
    fn guests_are_shown_between_a_heading_and_their_sums() {
        let (lines, marked) = shown(&screen(), 120);
        assert!(lines[0].starts_with("GUEST"), "{lines:?}");
        assert_eq!(marked, "PRIVATE");
        assert!(lines[1].starts_with("b\\u001b[2J"), "{lines:?}");
        assert!(lines[6].starts_with("3 guests"), "{lines:?}");
        assert_eq!(lines[7], KEYS);
    }

    #[test]
    fn keys_choose_the_column_and_the_way() {
        let mut screen = screen();
        assert_eq!(names(&screen), ["b", "c", "a"]);
        press(&mut screen, KeyCode::Char('r'));
        assert_eq!(names(&screen), ["c", "a", "b"]);
        for _ in 0..3 {
            assert_eq!(press(&mut screen, KeyCode::Left), KeyEffect::Stay);
        }
        assert_eq!(names(&screen), ["a", "b", "c"]);
        assert_eq!(shown(&screen, 120).1, "GUEST");
        press(&mut screen, KeyCode::Right);
        assert_eq!(names(&screen), ["b", "c", "a"]);
    }

    #[test]
    fn rows_scroll_but_not_out_of_sight() {
        let mut screen = screen();
        for _ in 0..9 {
            press(&mut screen, KeyCode::Down);
        }
        assert_eq!(names(&screen), ["a"]);
        press(&mut screen, KeyCode::Up);
        assert_eq!(names(&screen), ["c", "a"]);
    }

    #[test]
    fn files_take_the_place_of_guests() {
        let mut screen = screen();
        press(&mut screen, KeyCode::Char('f'));
        let (lines, marked) = shown(&screen, 120);
        assert!(lines[0].starts_with("FILE") && lines[1].starts_with("/base.vhdx"));
        assert_eq!(marked, "");
    }

    #[test]
    fn a_terminal_of_any_size_is_drawn_on() {
        for width in [1, 10, 40, 300] {
            shown(&screen(), width);
        }
        shown(&Screen::new(Column::Cpu, true), 80);
    }

    #[test]
    fn where_there_is_no_room_names_are_cut_and_figures_are_whole() {
        assert_eq!(fitted(&[20, 7, 7], 80), [20, 7, 7]);
        assert_eq!(fitted(&[20, 7, 7], 32), [14, 7, 7]);
        assert_eq!(fitted(&[20, 7, 7], 29), [20, 7]);
        assert_eq!(fitted(&[20, 7], 5), [5]);
        let (lines, _) = shown(&screen(), 80);
        assert!(
            lines[0].starts_with("GUEST") && lines[0].ends_with("MERGER%"),
            "{lines:?}"
        );
    }

    #[test]
    fn quitting_has_three_keys() {
        let mut screen = screen();
        assert_eq!(press(&mut screen, KeyCode::Char('q')), KeyEffect::Quit);
        assert_eq!(press(&mut screen, KeyCode::Esc), KeyEffect::Quit);
        assert_eq!(press(&mut screen, KeyCode::Char('c')), KeyEffect::Stay);
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(screen.handle(&Event::Key(interrupt)), KeyEffect::Quit);
    }
}
