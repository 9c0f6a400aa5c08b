//! The metrics that a guest's process may have, for a reader who does not believe the process: what they are called,
//! what they mean and which labels they have is from here, and only values are from the process.

/// Written by the test that writes the reference of metrics (`make reference`): name, kind, labels and explanation,
/// with tabs between them.
const FAMILIES: &str = include_str!("families.txt");

/// How the values of a metric are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FamilyKind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
    /// How often values were below bounds.
    Histogram,
}

impl FamilyKind {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }

    /// What stands behind the name of the metric in the names of its samples.
    pub fn suffixes(self) -> &'static [&'static str] {
        match self {
            Self::Counter => &["_total"],
            Self::Gauge => &[""],
            Self::Histogram => &["_bucket", "_count", "_sum"],
        }
    }
}

/// A metric.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    /// Its name, without what stands behind it in samples.
    pub name: &'static str,
    /// Its kind.
    pub kind: FamilyKind,
    /// Its labels, without the bound of a histogram.
    pub labels: Vec<&'static str>,
    /// What it is.
    pub help: &'static str,
}

impl Family {
    fn from_line(line: &'static str) -> Option<Self> {
        let mut words = line.split('\t');
        let (name, kind, labels, help) =
            (words.next()?, words.next()?, words.next()?, words.next()?);
        let kind = match kind {
            "counter" => FamilyKind::Counter,
            "gauge" => FamilyKind::Gauge,
            "histogram" => FamilyKind::Histogram,
            _ => return None,
        };
        let labels = labels
            .split(',')
            .filter(|label| !label.is_empty())
            .collect();
        Some(Self {
            name,
            kind,
            labels,
            help,
        })
    }

    /// The unit, which the name ends in.
    pub fn unit(&self) -> Option<&'static str> {
        let (_, last) = self.name.rsplit_once('_')?;
        ["bytes", "seconds", "pages"]
            .contains(&last)
            .then_some(last)
    }
}

/// All metrics of a guest.
pub fn families() -> Vec<Family> {
    FAMILIES.lines().filter_map(Family::from_line).collect()
}
