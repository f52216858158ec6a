/*
 * BPF programs on the entry and the exit of a kernel function, as agents that
 * watch a machine use them (fentry and fexit).
 *
 *   fexit churn FUNCTION   attaches and detaches both, again and again
 *   fexit sleep FUNCTION   attaches both, and while they are there a task sleeps
 *                          in nanosleep() for a tenth of a second, again and again
 *   fexit hold FUNCTION    attaches both, says "sleeping", and sleeps in pause()
 *                          until SIGUSR1
 *   fexit busy FUNCTION    attaches a program that counts for nearly all of the
 *                          time to the entry, and calls getppid() again and again
 *
 * The function's number in the kernel's types is looked up in its BTF
 * (Documentation/bpf/btf.rst); the other programs do nothing.
 */
#include "rounds.h"

#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/btf.h>
#include <sched.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>

#define NAP_NS 100000000L
/* The kernel looks at each round of the loop before it takes the program. */
#define COUNT_TO 40000

static uint32_t function;

/* What stands behind a type of that kind, in bytes. */
static size_t behind(const struct btf_type *type)
{
	size_t vlen = BTF_INFO_VLEN(type->info);

	switch (BTF_INFO_KIND(type->info)) {
	case BTF_KIND_INT:
	case 14: /* VAR */
	case 17: /* DECL_TAG */
		return 4;
	case BTF_KIND_ARRAY:
		return sizeof(struct btf_array);
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
		return vlen * sizeof(struct btf_member);
	case BTF_KIND_ENUM:
		return vlen * sizeof(struct btf_enum);
	case 13: /* FUNC_PROTO */
		return vlen * sizeof(struct btf_param);
	case 15: /* DATASEC */
	case 19: /* ENUM64 */
		return vlen * 12;
	default:
		return 0;
	}
}

static uint32_t find(const char *name)
{
	int fd = open("/sys/kernel/btf/vmlinux", O_RDONLY);
	const struct btf_header *header;
	const char *types, *end, *strings;
	struct stat stat;
	uint32_t id;
	char *btf;
	off_t got;

	if (fd < 0 || fstat(fd, &stat))
		cannot_tell("the kernel's types");
	btf = malloc(stat.st_size);
	for (got = 0; btf && got < stat.st_size;) {
		ssize_t len = read(fd, btf + got, stat.st_size - got);

		if (len <= 0)
			cannot_tell("the kernel's types");
		got += len;
	}
	close(fd);
	if (!btf)
		cannot_tell("memory");
	header = (const void *)btf;
	types = btf + header->hdr_len + header->type_off;
	strings = btf + header->hdr_len + header->str_off;
	end = types + header->type_len;
	for (id = 1; types < end; id++) {
		const struct btf_type *type = (const void *)types;

		if (BTF_INFO_KIND(type->info) == BTF_KIND_FUNC && !strcmp(strings + type->name_off, name)) {
			free(btf);
			return id;
		}
		types += sizeof(*type) + behind(type);
	}
	errno = ENOENT;
	cannot_tell(name);
	return 0;
}

/* return 0 */
static const struct bpf_insn nothing_to_do[] = {
	{ .code = BPF_ALU64 | BPF_MOV | BPF_K },
	{ .code = BPF_JMP | BPF_EXIT },
};

/* counts in R0, then the same */
static const struct bpf_insn count[] = {
	{ .code = BPF_ALU64 | BPF_MOV | BPF_K },
	{ .code = BPF_ALU64 | BPF_ADD | BPF_K, .imm = 1 },
	{ .code = BPF_JMP | BPF_JLT | BPF_K, .off = -2, .imm = COUNT_TO },
	{ .code = BPF_ALU64 | BPF_MOV | BPF_K },
	{ .code = BPF_JMP | BPF_EXIT },
};

static int attach_program(enum bpf_attach_type where, const struct bpf_insn *program, uint32_t length)
{
	union bpf_attr attr = {
		.prog_type = BPF_PROG_TYPE_TRACING,
		.expected_attach_type = where,
		.attach_btf_id = function,
		.insns = (uintptr_t)program,
		.insn_cnt = length,
		.license = (uintptr_t)"GPL",
	};
	int loaded = syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof(attr)), attached;

	if (loaded < 0) {
		is_wrong("loading");
		return -1;
	}
	memset(&attr, 0, sizeof(attr));
	attr.raw_tracepoint.prog_fd = loaded;
	attached = syscall(SYS_bpf, BPF_RAW_TRACEPOINT_OPEN, &attr, sizeof(attr));
	if (attached < 0)
		is_wrong("attaching");
	close(loaded);
	return attached;
}

static int attach(enum bpf_attach_type where)
{
	return attach_program(where, nothing_to_do, sizeof(nothing_to_do) / sizeof(*nothing_to_do));
}

static void call(void)
{
	syscall(SYS_getppid);
}

static void nap(void)
{
	const struct timespec time = { .tv_nsec = NAP_NS };

	nanosleep(&time, NULL);
}

static void attach_and_detach(void)
{
	int entry = attach(BPF_TRACE_FENTRY), exit = attach(BPF_TRACE_FEXIT);

	sched_yield();
	close(exit);
	close(entry);
}

static void nothing(int signal)
{
	(void)signal;
}

static void hold(void)
{
	struct sigaction action = { .sa_handler = nothing };
	int entry = attach(BPF_TRACE_FENTRY), exit = attach(BPF_TRACE_FEXIT);

	sigaction(SIGUSR1, &action, NULL);
	puts("sleeping");
	fflush(stdout);
	pause();
	rounds++;
	close(exit);
	close(entry);
}

static int usage(void)
{
	puts("error: fexit churn|sleep|hold|busy FUNCTION");
	return UNKNOWN;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return usage();
	function = find(argv[2]);
	if (!strcmp(argv[1], "churn")) {
		repeat(attach_and_detach);
	} else if (!strcmp(argv[1], "sleep")) {
		int entry = attach(BPF_TRACE_FENTRY), exit = attach(BPF_TRACE_FEXIT);

		repeat(nap);
		close(exit);
		close(entry);
	} else if (!strcmp(argv[1], "hold")) {
		hold();
	} else if (!strcmp(argv[1], "busy")) {
		int entry = attach_program(BPF_TRACE_FENTRY, count, sizeof(count) / sizeof(*count));

		repeat(call);
		close(entry);
	} else {
		return usage();
	}
	return say_rounds();
}
