//! Where the bytes of an open file are.
//!
//! Threads share the [`State`] under a lock that is held for lines and never over I/O: when a page of metadata has to
//! be read, the file has to grow or pages have to be committed, the lock is given up, the work done, and the request
//! looked at again, a block at a time.

use std::any::Any;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

use super::bat::BlockState;
use super::bitmap;
use super::format::Guid;
use super::pages::blank;
use super::state::{Change, Commit, State, Stop};
use super::view::View;
use crate::disk::{
    ByteRange, Disk, DiskError, Extent, ExtentKind, ExtentState, Geometry, Mapping, RequestId,
};

/// An open VHDX, over its parents if it has some. See the [module](super) for what it promises.
#[derive(Debug)]
pub struct Vhdx {
    pub(super) geometry: Geometry,
    pub(super) id: Guid,
    /// Size of the virtual disk in bytes, as it is now.
    pub(super) size: AtomicU64,
    /// The disk was opened for writing and takes no more writes, as a child has been put on it.
    pub(super) frozen: AtomicBool,
    /// Bytes of a payload block.
    pub(super) block_size: u64,
    /// The disk is to keep the space of its blocks.
    pub(super) fixed: bool,
    /// Space that is freed goes back to the host at once.
    pub(super) punch_holes: bool,
    pub(super) view: View,
    /// End of the bytes of the file that payload can be read from. Of a file that is seen through its log, blocks can
    /// lie past it, where a replay would extend the file by zeros.
    pub(super) readable_end: u64,
    pub(super) state: Mutex<State>,
    /// Signals the end of an exclusion and, during one, the end of requests.
    pub(super) changed: Condvar,
    /// Locked while the length of the file changes.
    pub(super) growth: Mutex<()>,
    pub(super) commit: Mutex<Commit>,
    /// Flushes that were asked for.
    pub(super) flushes: AtomicU64,
    /// What lies below a child. Parents are open for reading.
    pub(super) parent: Option<Arc<Vhdx>>,
}

/// What a layer says of a part of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lookup {
    /// It lies in the file, at this offset.
    Here(u64),
    /// The layer has no bytes; it reads as zeros.
    Zeros(BlockState),
    /// The layer says nothing.
    Below,
}

/// Blocks of which is remembered what the parents hold. With blocks of 2 MiB they are 2 GiB of the disk.
const KEPT_BELOW: usize = 1024;
/// Most extents of such a block.
const FEW: usize = 4;
/// The number of a write that changes metadata has this bit.
const CHANGES: u64 = 1 << 63;

impl Vhdx {
    /// The disk as a VHDX, where it is one, for operations that no other format has.
    pub fn of(disk: Arc<dyn Disk>) -> Option<Arc<Self>> {
        let disk: Arc<dyn Any + Send + Sync> = disk;
        disk.downcast().ok()
    }

    /// Bytes of a payload block.
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// The parent of a differencing disk.
    pub fn parent(&self) -> Option<&Arc<Self>> {
        self.parent.as_ref()
    }

    pub(super) fn check_write(&self, range: ByteRange) -> Result<(), DiskError> {
        if self.is_read_only() {
            return Err(DiskError::ReadOnly);
        }
        self.geometry().check(range)
    }

    /// The parts of a range, a block each: its number, and first byte and end in the disk.
    pub(super) fn parts(
        &self,
        range: ByteRange,
    ) -> impl Iterator<Item = (u64, Range<u64>)> + use<> {
        let block_size = self.block_size;
        let blocks = if range.is_empty() {
            0..0
        } else {
            range.offset() / block_size..range.end().div_ceil(block_size)
        };
        blocks.map(move |block| {
            let start = range.offset().max(block * block_size);
            (block, start..range.end().min((block + 1) * block_size))
        })
    }

    /// Answers a request under the state lock, doing outside it what the request has to wait for.
    pub(super) fn with_state<T>(
        &self,
        mut request: impl FnMut(&mut State) -> Result<T, Stop>,
    ) -> Result<T, DiskError> {
        loop {
            match self.with_pages(&mut request) {
                Ok(answer) => return Ok(answer),
                Err(stop) => self.wait_for(stop)?,
            }
        }
    }

    /// Answers a request under the state lock, reading the pages that it needs.
    pub(super) fn with_pages<T>(
        &self,
        mut request: impl FnMut(&mut State) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        loop {
            let answer = request(&mut self.state.lock());
            match answer {
                Err(Stop::Page(page)) => self.load(page)?,
                other => return other,
            }
        }
    }

    /// Does what a request has to wait for.
    fn wait_for(&self, stop: Stop) -> Result<(), DiskError> {
        match stop {
            Stop::Failed(error) => Err(error),
            Stop::Page(page) => self.load(page),
            Stop::Announcement(level) => self.announce(level),
            Stop::Growth(needed) => self.grow(needed),
            Stop::Commit => self.commit_pages(),
            Stop::Excluded => {
                let mut state = self.state.lock();
                self.changed
                    .wait_while(&mut state, |state| state.excluded.is_some());
                Ok(())
            }
        }
    }

    /// Reads a page that is not here.
    fn load(&self, page: u64) -> Result<(), DiskError> {
        loop {
            let seen = {
                let state = self.state.lock();
                if state.pages.has(page) {
                    return Ok(());
                }
                state.pages.evictions()
            };
            let mut bytes = blank();
            self.view
                .read(&mut bytes[..], page)
                .map_err(|source| DiskError::Io {
                    operation: format!("read the metadata at file offset {page:#x}"),
                    source,
                })?;
            let mut state = self.state.lock();
            // While it was read the page may have been loaded, changed, committed and dropped by others.
            if state.pages.evictions() == seen {
                state.pages.insert(page, bytes);
                return Ok(());
            }
        }
    }

    /// Says what this layer alone holds of a part of a block, in order and without gaps; `found` is not called where it
    /// stops.
    pub(super) fn look_up(
        state: &mut State,
        block: u64,
        part: Range<u64>,
        mut found: impl FnMut(Range<u64>, Lookup),
    ) -> Result<(), Stop> {
        let entry = state.block(block)?;
        let base = block * state.layout.block_size;
        match entry.state {
            BlockState::FullyPresent => {
                found(
                    part.clone(),
                    Lookup::Here(entry.offset + (part.start - base)),
                );
            }
            BlockState::NotPresent if state.layout.has_parent => found(part, Lookup::Below),
            BlockState::NotPresent
            | BlockState::Undefined
            | BlockState::Zero
            | BlockState::Unmapped => found(part, Lookup::Zeros(entry.state)),
            BlockState::PartiallyPresent => {
                let sector = state.layout.sector;
                let pages = state.bits(block, &part)?;
                // Looked for first, so that `found` is called once for each part.
                for (page, _) in pages.clone() {
                    state.pages.bytes(page).ok_or(Stop::Page(page))?;
                }
                let mut at = part.start;
                for (page, mut bits) in pages {
                    let bytes = state.pages.bytes(page).ok_or(Stop::Page(page))?;
                    while !bits.is_empty() {
                        let (here, count) = bitmap::run(bytes, &bits);
                        bits.start += count;
                        let end = part.end.min(at + count as u64 * sector);
                        let what = if here {
                            Lookup::Here(entry.offset + (at - base))
                        } else {
                            Lookup::Below
                        };
                        found(at..end, what);
                        at = end;
                    }
                }
            }
        }
        Ok(())
    }

    /// Looks a range up in this layer; what lies below is added to `below`.
    fn look_up_all(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
        start: usize,
        below: &mut Vec<ByteRange>,
    ) -> Result<(), DiskError> {
        let file = self.view.medium.file();
        for (block, part) in self.parts(range) {
            self.with_state(|state| {
                Self::look_up(state, block, part.clone(), |part, found| match found {
                    Lookup::Here(file_offset) => {
                        let len = part.end - part.start;
                        let held = self.readable_end.saturating_sub(file_offset).min(len);
                        append_data(out, start, file, part.start, held, file_offset);
                        append_empty(out, start, part.start + held, len - held, true);
                    }
                    Lookup::Zeros(state) => {
                        let zero = state == BlockState::Zero;
                        append_empty(out, start, part.start, part.end - part.start, zero);
                    }
                    Lookup::Below => {
                        below.extend(ByteRange::new(part.start, part.end - part.start));
                    }
                })
            })?;
        }
        Ok(())
    }

    /// Resolves a range through all layers.
    pub(super) fn resolve(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<(), DiskError> {
        let start = out.len();
        let mut below = Vec::new();
        self.look_up_all(range, out, start, &mut below)?;
        if below.is_empty() {
            return Ok(());
        }
        for range in below {
            match self.known_below(range.offset() / self.block_size)? {
                Some(known) => cut_out(&known, range, out, start),
                None => self.resolve_below(vec![range], out, start)?,
            }
        }
        in_order(out, start);
        Ok(())
    }

    /// Resolves ranges through the parents alone.
    fn resolve_below(
        &self,
        mut below: Vec<ByteRange>,
        out: &mut Vec<Extent>,
        start: usize,
    ) -> Result<(), DiskError> {
        let mut layer = self.parent.as_deref();
        while let Some(parent) = layer
            && !below.is_empty()
        {
            let size = parent.size.load(Ordering::Relaxed);
            for range in std::mem::take(&mut below) {
                // A child can be larger than its parent, and has zeros there.
                let end = range.end().min(size).max(range.offset());
                if let Some(inside) = ByteRange::new(range.offset(), end - range.offset()) {
                    parent.look_up_all(inside, out, start, &mut below)?;
                }
                append_empty(out, start, end, range.end() - end, false);
            }
            layer = parent.parent.as_deref();
        }
        for range in below {
            append_empty(out, start, range.offset(), range.len(), false);
        }
        Ok(())
    }

    /// What the parents hold of a block, if that is few extents; then it is remembered, however many layers it took.
    /// `None` where it is more, and where the parent may change.
    fn known_below(&self, block: u64) -> Result<Option<Arc<[Extent]>>, DiskError> {
        if let Some(known) = self.state.lock().below.get(&block) {
            return Ok((!known.is_empty()).then(|| Arc::clone(known)));
        }
        let is_constant = self
            .parent
            .as_ref()
            .is_some_and(|parent| parent.is_read_only());
        // Also past the end of the disk, which may come to lie farther back.
        let whole = ByteRange::new(block * self.block_size, self.block_size);
        let Some(whole) = whole.filter(|_| is_constant) else {
            return Ok(None);
        };
        let mut extents = Vec::new();
        self.resolve_below(vec![whole], &mut extents, 0)?;
        in_order(&mut extents, 0);
        if extents.len() > FEW {
            extents.clear();
        }
        let known: Arc<[Extent]> = extents.into();
        let mut state = self.state.lock();
        if state.below.len() >= KEPT_BELOW {
            state.below.clear();
        }
        state.below.insert(block, Arc::clone(&known));
        Ok((!known.is_empty()).then_some(known))
    }

    /// Maps a range through all layers from number `layer`, the deepest of which is `until` if that is given.
    fn map_layers(&self, range: ByteRange, out: &mut Vec<Mapping>) -> Result<(), DiskError> {
        let start = out.len();
        let mut below = vec![range];
        let mut layer = Some(self);
        let mut depth = 0;
        while let Some(disk) = layer
            && !below.is_empty()
        {
            let size = disk.size.load(Ordering::Relaxed);
            for range in std::mem::take(&mut below) {
                let end = range.end().min(size).max(range.offset());
                let inside = ByteRange::new(range.offset(), end - range.offset());
                for (block, part) in inside.into_iter().flat_map(|inside| disk.parts(inside)) {
                    disk.with_state(|state| {
                        Self::look_up(state, block, part.clone(), |part, found| {
                            let len = part.end - part.start;
                            let (state, file_offset) = match found {
                                Lookup::Here(offset) => (ExtentState::Mapped, Some(offset)),
                                Lookup::Zeros(BlockState::Zero) => (ExtentState::Zero, None),
                                Lookup::Zeros(BlockState::Unmapped) => {
                                    (ExtentState::Unmapped, None)
                                }
                                Lookup::Zeros(BlockState::Undefined) => {
                                    (ExtentState::Undefined, None)
                                }
                                Lookup::Zeros(_) => (ExtentState::Transparent, None),
                                Lookup::Below => {
                                    below.extend(ByteRange::new(part.start, len));
                                    return;
                                }
                            };
                            out.push(Mapping {
                                offset: part.start,
                                len,
                                state,
                                layer: depth,
                                file_offset,
                            });
                        })
                    })?;
                }
                below_end(out, end, range.end(), depth);
            }
            layer = disk.parent.as_deref();
            depth += 1;
        }
        for range in below {
            below_end(out, range.offset(), range.end(), depth.saturating_sub(1));
        }
        out[start..].sort_unstable_by_key(|mapping| mapping.offset);
        join_mappings(out, start);
        Ok(())
    }

    fn enter(&self) -> u64 {
        self.state.lock().in_flight.enter()
    }

    /// Lets a write begin when nothing of its range is excluded. From then on it waits for no exclusion, as an
    /// exclusion waits for it.
    fn enter_write(&self, range: ByteRange) -> Result<u64, DiskError> {
        let blocks = range.offset() / self.block_size..range.end().div_ceil(self.block_size);
        let mut state = self.state.lock();
        self.changed
            .wait_while(&mut state, |state| state.excludes(&blocks));
        if self.is_read_only() {
            return Err(DiskError::ReadOnly);
        }
        Ok(state.in_flight.enter())
    }

    fn request_id(&self, epoch: u64, changes: Vec<Change>) -> RequestId {
        if changes.is_empty() {
            return RequestId::new(epoch);
        }
        let mut state = self.state.lock();
        let number = state.next_write;
        state.next_write += 1;
        state.writes.insert(number, (epoch, changes));
        RequestId::new(CHANGES | number)
    }

    /// Whether the disk takes no writes, for now or ever.
    pub(super) fn is_read_only(&self) -> bool {
        self.geometry.read_only || self.frozen.load(Ordering::Acquire)
    }

    /// The disk and its parents.
    fn layers(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |layer| layer.parent.as_deref())
    }

    pub(super) fn exit(&self, epoch: u64) {
        let mut state = self.state.lock();
        state.in_flight.exit(epoch);
        let waited_for = state.excluded.is_some();
        drop(state);
        if waited_for {
            self.changed.notify_all();
        }
    }
}

fn below_end(out: &mut Vec<Mapping>, offset: u64, end: u64, layer: u32) {
    if offset < end {
        out.push(Mapping {
            offset,
            len: end - offset,
            state: ExtentState::Transparent,
            layer,
            file_offset: None,
        });
    }
}

fn join_mappings(out: &mut Vec<Mapping>, start: usize) {
    let tail = out.split_off(start);
    for next in tail {
        match out.get_mut(start..).and_then(<[_]>::last_mut) {
            Some(last)
                if (last.state, last.layer) == (next.state, next.layer)
                    && last.file_offset.map(|offset| offset + last.len) == next.file_offset =>
            {
                last.len += next.len;
            }
            Some(_) | None => out.push(next),
        }
    }
}

/// Appends the part of known extents that lies in a range.
fn cut_out(known: &[Extent], range: ByteRange, out: &mut Vec<Extent>, start: usize) {
    for extent in known {
        let from = extent.offset.max(range.offset());
        let to = (extent.offset + extent.len).min(range.end());
        if from >= to {
            continue;
        }
        match &extent.kind {
            ExtentKind::Data { file, file_offset } => {
                let at = file_offset + (from - extent.offset);
                append_data(out, start, file, from, to - from, at);
            }
            ExtentKind::Zero => append_empty(out, start, from, to - from, true),
            ExtentKind::Unmapped => append_empty(out, start, from, to - from, false),
        }
    }
}

/// Appends bytes of a file to the extents from `start` on, joining them to the last where they are one.
pub(super) fn append_data(
    out: &mut Vec<Extent>,
    start: usize,
    file: &Arc<File>,
    offset: u64,
    len: u64,
    file_offset: u64,
) {
    if len == 0 {
        return;
    }
    if let Some(last) = out.get_mut(start..).and_then(<[_]>::last_mut)
        && last.offset + last.len == offset
        && let ExtentKind::Data {
            file: before,
            file_offset: at,
        } = &last.kind
        && at + last.len == file_offset
        && Arc::ptr_eq(before, file)
    {
        last.len += len;
        return;
    }
    out.push(Extent {
        offset,
        len,
        kind: ExtentKind::Data {
            file: Arc::clone(file),
            file_offset,
        },
    });
}

/// Appends a range without bytes to the extents from `start` on, joining it to the last where they are one.
fn append_empty(out: &mut Vec<Extent>, start: usize, offset: u64, len: u64, zero: bool) {
    if len == 0 {
        return;
    }
    if let Some(last) = out.get_mut(start..).and_then(<[_]>::last_mut)
        && last.offset + last.len == offset
        && match last.kind {
            ExtentKind::Zero => zero,
            ExtentKind::Unmapped => !zero,
            ExtentKind::Data { .. } => false,
        }
    {
        last.len += len;
        return;
    }
    let kind = if zero {
        ExtentKind::Zero
    } else {
        ExtentKind::Unmapped
    };
    out.push(Extent { offset, len, kind });
}

/// Sorts the extents from `start` on, which several layers have added, and joins what is one.
fn in_order(out: &mut Vec<Extent>, start: usize) {
    if out[start..].is_sorted_by_key(|extent| extent.offset) {
        return;
    }
    let mut tail = out.split_off(start);
    tail.sort_unstable_by_key(|extent| extent.offset);
    for extent in tail {
        let Extent { offset, len, kind } = extent;
        match kind {
            ExtentKind::Data { file, file_offset } => {
                append_data(out, start, &file, offset, len, file_offset);
            }
            ExtentKind::Zero => append_empty(out, start, offset, len, true),
            ExtentKind::Unmapped => append_empty(out, start, offset, len, false),
        }
    }
}

impl Disk for Vhdx {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size.load(Ordering::Relaxed),
            read_only: self.is_read_only(),
            ..self.geometry
        }
    }

    fn resolve_read(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<RequestId, DiskError> {
        self.geometry().check(range)?;
        let start = out.len();
        let epoch = self.enter();
        match self.resolve(range, out) {
            Ok(()) => Ok(RequestId::new(epoch)),
            Err(error) => {
                out.truncate(start);
                self.exit(epoch);
                Err(error)
            }
        }
    }

    fn resolve_write(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<RequestId, DiskError> {
        self.check_write(range)?;
        let start = out.len();
        loop {
            let epoch = self.enter_write(range)?;
            let mut changes = Vec::new();
            let placed = self.parts(range).try_for_each(|(block, part)| {
                loop {
                    match self.place(block, &part, out, start, &mut changes) {
                        Err(Stop::Growth(needed)) if self.can_reclaim(needed) => {
                            return Err(Stop::Growth(needed));
                        }
                        Err(stop) => self.wait_for(stop)?,
                        Ok(()) => return Ok(()),
                    }
                }
            });
            let Err(stop) = placed else {
                return Ok(self.request_id(epoch, changes));
            };
            // Freed space waits for the requests in flight, so this is none while it waits for that. What was placed
            // stays so.
            out.truncate(start);
            self.finish_changes(changes, false);
            self.exit(epoch);
            self.wait_for(stop)?;
        }
    }

    fn finish(&self, id: RequestId, ok: bool) {
        let number = id.number();
        if number & CHANGES == 0 {
            return self.exit(number);
        }
        let write = self.state.lock().writes.remove(&(number & !CHANGES));
        if let Some((epoch, changes)) = write {
            self.finish_changes(changes, ok);
            self.exit(epoch);
        }
    }

    fn flush_by_sync(&self) -> Option<Arc<File>> {
        let state = self.state.lock();
        // Pages that a commit has put in place, and zeros, wait for a sync of this disk's own, which log and space hear
        // of.
        let is_idle =
            !state.poisoned && !state.unsynced && state.pages.is_idle() && state.space.is_idle();
        is_idle.then(|| Arc::clone(self.view.medium.file()))
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.is_read_only() {
            Ok(())
        } else {
            self.flush_all()
        }
    }

    fn discard(&self, range: ByteRange) -> Result<(), DiskError> {
        self.trim(range)
    }

    fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), DiskError> {
        self.zero(range, may_unmap)
    }

    fn map(&self, range: ByteRange, out: &mut Vec<Mapping>) -> Result<(), DiskError> {
        self.geometry().check(range)?;
        let start = out.len();
        self.map_layers(range, out)
            .inspect_err(|_| out.truncate(start))
    }

    fn close(&self) -> Result<(), DiskError> {
        if self.is_read_only() {
            Ok(())
        } else {
            self.close_all()
        }
    }

    fn is_immutable(&self, file: &Arc<File>) -> bool {
        self.layers()
            .any(|layer| layer.is_read_only() && Arc::ptr_eq(layer.view.medium.file(), file))
    }

    fn files(&self) -> Vec<Arc<File>> {
        self.layers()
            .map(|layer| layer.view.medium.file().clone())
            .collect()
    }
}

impl Drop for Vhdx {
    fn drop(&mut self) {
        match self.close() {
            // Where the disk is poisoned the failure has been returned before, and the log stays for the next open to
            // replay.
            Ok(()) | Err(DiskError::Poisoned) => {}
            Err(error) => {
                tracing::error!(
                    error = %report::chain(&error),
                    "a VHDX could not be closed; its log will be replayed when it is opened next"
                );
            }
        }
    }
}
