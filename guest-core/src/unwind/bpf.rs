//! Code that the kernel's BPF compiler generates: programs, and the trampolines that attach them to functions.
//!
//! The kernel finds the image (a program or trampoline) that holds an address in the tree `bpf_tree` of `struct bpf_ksym`
//! (kernel/bpf/core.c since 5.7, trampolines since 5.8). The tree is a latch: two trees and a sequence number, whose lowest bit selects the
//! tree that does not change now (include/linux/rbtree_latch.h).
//!
//! The code has no ORC table, but keeps a frame pointer in BP: `push rbp`, `mov rbp, rsp`, and then it reserves stack space
//! (arch/x86/net/bpf_jit_comp.c: `emit_prologue`, `arch_prepare_bpf_trampoline`; read in 6.1 and 7.2). Since 7.2 or before, the kernel also
//! records the range in which BP is a frame pointer, `fp_start` and `fp_end`, and unwinds by it (arch/x86/kernel/unwind_orc.c:
//! `orc_bpf_find`). This module requires that the code begins with these instructions, and that BP is as far above SP as they make it.
//!
//! A trampoline with a program for a function's end (fexit) calls the function's code behind its ftrace site. The kernel lists it for as
//! long as a task is in it (kernel/bpf/trampoline.c: `bpf_tramp_image_put`), so that what was found for a sleeping task holds until the
//! task runs.

use super::error::UnwindError;
use super::orc::{Base, Kind, Rule};
use super::scan::{OldCode, OldFunction};
use super::view::KernelView;
use super::walk::Frame;
use crate::addr::Gva;
use crate::btf::BtfError;
use crate::memory::MemoryError;
use crate::paging::PAGE_SIZE;
use crate::text::plain;
use std::ops::Range;

/// Largest depth of the tree. A red-black tree of that depth has more images than fit into memory.
const DEPTH_MAX: usize = 48;
/// How often the tree is searched if the guest changes it meanwhile.
const SEARCHES_MAX: usize = 4;
/// Longest name that is read, in bytes (`KSYM_NAME_LEN`).
const NAME_BYTES_MAX: u64 = 512;
/// Bytes at the start of an image in which BP is set up.
const PROLOGUE_BYTES: usize = 64;
/// The instructions that may come before: their first bytes, and their lengths. They serve tracers and control-flow protection, and count
/// calls and tail calls.
const BEFORE: [(&[u8], usize); 9] = [
    (&[0xf3, 0x0f, 0x1e, 0xfa], 4),        // endbr64
    (&[0x0f, 0x1f, 0x44, 0x00, 0x00], 5),  // nop, for tracing of the program
    (&[0xe8], 5),                          // call, while it is traced
    (&[0x0f, 0x1f, 0x00], 3),              // nop
    (&[0x66, 0x90], 2),                    // nop
    (&[0x31, 0xc0], 2),                    // xor eax, eax
    (&[0x48, 0x31, 0xc0], 3),              // xor rax, rax
    (&[0x65, 0x48, 0xc1, 0x3c, 0x25], 10), // sar gs:[call_depth], 5
    (&[0x65, 0x48, 0xc1, 0x3d], 9),        // the same, relative to RIP
];
/// `push rbp`, `mov rbp, rsp`.
const SET_UP: [u8; 4] = [0x55, 0x48, 0x89, 0xe5];
const ENDBR: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// `sub rsp, imm8` and `sub rsp, imm32`.
const MAKE_ROOM: [[u8; 3]; 2] = [[0x48, 0x83, 0xec], [0x48, 0x81, 0xec]];
/// Most bytes that the code pushes beyond the space that it reserves: registers of its caller, the count of tail calls, arguments.
const PUSHED_BYTES_MAX: u64 = 256;
/// Longest trampoline, in bytes (`arch_bpf_trampoline_size`, kernel/bpf/trampoline.c). Before 6.9, each has one page.
const TRAMPOLINE_BYTES_MAX: u64 = PAGE_SIZE;
/// `call rel32`
const CALL: u8 = 0xe8;
const CALL_BYTES: usize = 5;

/// Where the tree is, and the offsets of what is read of each image.
#[derive(Debug, Clone)]
pub(super) struct BpfCode {
    sequence: Gva,
    /// Guest-virtual address of the root of each tree, and the offset of its node in `struct bpf_ksym`.
    trees: [(Gva, u64); 2],
    left: u64,
    right: u64,
    start: u64,
    end: u64,
    name: Range<u64>,
    frame: Option<Range<u64>>,
}

/// One program or trampoline.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Image {
    ksym: Gva,
    text: Range<Gva>,
}

impl BpfCode {
    /// Looks up the tree; `None` for a kernel without BPF, or one that lists its code in another way. BPF's code is then unknown code.
    pub fn find(view: &dyn KernelView) -> Option<Self> {
        let tree = view.symbol("bpf_tree")?;
        Self::read(view, tree).ok()
    }

    fn read(view: &dyn KernelView, tree: Gva) -> Result<Self, BtfError> {
        let (root, ksym) = (
            view.btf().structure("latch_tree_root")?,
            view.btf().structure("bpf_ksym")?,
        );
        let node = view.btf().structure("rb_node")?;
        let name = ksym.member("name")?;
        let tree_at = |index: usize| {
            let root = root.offset(&format!("tree[{index}].rb_node"))?;
            Ok::<_, BtfError>((tree.wrapping_add(root), ksym.offset(&format!("tnode.node[{index}]"))?))
        };
        let frame = ksym.try_member("fp_start").zip(ksym.try_member("fp_end"));
        Ok(Self {
            sequence: tree.wrapping_add(root.offset("seq.seqcount.sequence")?),
            trees: [tree_at(0)?, tree_at(1)?],
            left: node.offset("rb_left")?,
            right: node.offset("rb_right")?,
            start: ksym.offset("start")?,
            end: ksym.offset("end")?,
            name: name.offset()..name.end(),
            frame: frame.map(|(start, end)| start.offset()..end.offset()),
        })
    }

    /// The rule that unwinds from `frame`, whose BP is `bp`. `None` for a frame that is not in BPF's code.
    ///
    /// # Errors
    ///
    /// The frame is in BPF's code, and BP may not be its frame pointer there.
    pub fn rule(&self, view: &dyn KernelView, frame: Frame, bp: u64) -> Option<Result<Rule, UnwindError>> {
        let image = self.image(view, frame.code())?;
        let why = match self.doubt(view, &image, frame, bp) {
            Ok(None) => return Some(Ok(FRAME_POINTER)),
            Ok(Some(why)) => why,
            Err(_) => "which cannot be read",
        };
        Some(Err(UnwindError::Bpf {
            ip: frame.ip,
            name: self.name(view, &image),
            why,
        }))
    }

    /// The function of `old` that the trampoline which holds `at` may be about to call. If the function has called the trampoline, a return
    /// address shows the function, too; since 7.2 or before, it may have jumped there (`bpf_trampoline_use_jmp`).
    pub fn calls<'o>(&self, view: &dyn KernelView, at: Gva, old: &'o OldCode) -> Option<&'o OldFunction> {
        let image = self.image(view, at)?;
        let len = image.text.end.checked_sub(image.text.start)?;
        let mut code = vec![0; usize::try_from(len.min(TRAMPOLINE_BYTES_MAX)).ok()?];
        view.read(image.text.start, &mut code).ok()?;
        calls_into(image.text.start, &code, old)
    }

    /// Why BP may not be the frame pointer of `frame`; `None` if it is.
    fn doubt(
        &self,
        view: &dyn KernelView,
        image: &Image,
        frame: Frame,
        bp: u64,
    ) -> Result<Option<&'static str>, MemoryError> {
        if frame.interrupted {
            return Ok(Some("which was interrupted there"));
        }
        let offset = frame.ip.checked_sub(image.text.start).unwrap_or(0);
        let len = usize::try_from(offset).unwrap_or(usize::MAX).min(PROLOGUE_BYTES);
        let mut code = vec![0; len];
        view.read(image.text.start, &mut code)?;
        let Some((set_up, reserved)) = prologue(&code) else {
            return Ok(Some("which does not begin as such code does"));
        };
        if let Some(frame) = &self.frame {
            let bound = |at: u64| view.read_u32(image.ksym.wrapping_add(at)).map(u64::from);
            let (start, end) = (bound(frame.start)?, bound(frame.end)?);
            if start < set_up as u64 || !(start..=end).contains(&offset) {
                return Ok(Some("which the kernel says has no frame pointer there"));
            }
        }
        let used = bp.checked_sub(frame.sp).and_then(|used| used.checked_sub(reserved));
        Ok(match used {
            Some(pushed) if pushed <= PUSHED_BYTES_MAX => None,
            _ => Some("and its frame pointer is not where such code has it"),
        })
    }

    fn name(&self, view: &dyn KernelView, image: &Image) -> String {
        let len = (self.name.end - self.name.start).min(NAME_BYTES_MAX);
        let mut name = vec![0; usize::try_from(len).unwrap_or(0)];
        match view.read(image.ksym.wrapping_add(self.name.start), &mut name) {
            Ok(()) => plain(&name),
            Err(_) => "?".to_owned(),
        }
    }

    /// The image that holds `at`; `None` if none does, or if the tree cannot be read. The address is then in unknown code.
    fn image(&self, view: &dyn KernelView, at: Gva) -> Option<Image> {
        for _ in 0..SEARCHES_MAX {
            let before = view.read_u32(self.sequence).ok()?;
            let [even, odd] = &self.trees;
            let found = self.search(view, if before % 2 == 0 { even } else { odd }, at);
            if view.read_u32(self.sequence) == Ok(before) {
                return found.ok()?;
            }
        }
        None
    }

    fn search(&self, view: &dyn KernelView, tree: &(Gva, u64), at: Gva) -> Result<Option<Image>, MemoryError> {
        let &(root, node_offset) = tree;
        let mut node = Gva(view.read_u64(root)?);
        for _ in 0..DEPTH_MAX {
            if node == Gva(0) {
                break;
            }
            let ksym = node.wrapping_offset(-node_offset.cast_signed());
            let word = |offset| view.read_u64(ksym.wrapping_add(offset)).map(Gva);
            let text = word(self.start)?..word(self.end)?;
            if text.contains(&at) {
                return Ok(Some(Image { ksym, text }));
            }
            let next = if at < text.start { self.left } else { self.right };
            node = Gva(view.read_u64(node.wrapping_add(next))?);
        }
        Ok(None)
    }
}

/// `orc_fp_entry`, arch/x86/kernel/unwind_orc.c.
const FRAME_POINTER: Rule = Rule {
    sp: Base::Bp,
    sp_offset: 16,
    bp: Base::PrevSp,
    bp_offset: -16,
    kind: Kind::Call,
    signal: false,
};

/// The offset at which the code has set up BP, and the stack space that it then reserves, in bytes; `None` for code that does not begin so.
pub(super) fn prologue(code: &[u8]) -> Option<(usize, u64)> {
    let mut rest = code;
    while !rest.starts_with(&SET_UP) {
        let (_, len) = BEFORE.iter().find(|(bytes, _)| rest.starts_with(bytes))?;
        rest = rest.get(*len..)?;
    }
    rest = rest.get(SET_UP.len()..)?;
    let set_up = code.len() - rest.len();
    rest = rest.strip_prefix(&ENDBR).unwrap_or(rest);
    let [short, long] = &MAKE_ROOM;
    let reserved = if let Some(bytes) = rest.strip_prefix(short) {
        u64::from(*bytes.first()?)
    } else if let Some(bytes) = rest.strip_prefix(long) {
        u64::from(u32::from_le_bytes(*bytes.first_chunk()?))
    } else {
        0
    };
    Some((set_up, reserved))
}

/// The first old function that `code`, at `start`, calls at an address behind the function's beginning. Bytes that only look like a call
/// count, too.
pub(super) fn calls_into<'o>(start: Gva, code: &[u8], old: &'o OldCode) -> Option<&'o OldFunction> {
    (1_u64..).zip(code.windows(CALL_BYTES)).find_map(|(behind, bytes)| {
        let (opcode, distance) = bytes.split_first()?;
        let distance = i32::from_le_bytes(distance.try_into().ok()?);
        let next = start.wrapping_add(behind + 4);
        let target = next.wrapping_offset(distance.into());
        (*opcode == CALL).then_some(())?;
        old.at_instruction(target)
            .filter(|function| function.code.start != target)
    })
}
