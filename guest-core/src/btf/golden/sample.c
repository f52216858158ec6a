/*
 * Source of sample.btf: gcc 12.2 -g -c sample.c; pahole 1.24 -J --btf_encode_detached=sample.btf sample.o
 * The offsets expected of it are those that `pahole -F btf sample.btf` prints.
 */
enum colour { RED, GREEN = 7, BLUE = -2 };
enum big { HUGE = 0x123456789abcULL };
typedef unsigned int u32;
typedef unsigned char u8;
typedef unsigned long long u64;

struct orc_entry {
	short sp_offset;
	short bp_offset;
	unsigned sp_reg : 4;
	unsigned bp_reg : 4;
	unsigned type : 3;
	unsigned signal : 1;
} __attribute__((packed));

struct thread {
	unsigned long tls[3];
	volatile unsigned long sp;
};

struct area {
	void *base;
	u32 size;
	const char *name;
};

struct task {
	volatile long state;
	union {
		struct {
			u32 lo, hi;
		};
		u64 both;
	};
	struct area mem[4];
	struct thread thread __attribute__((aligned(64)));
	enum colour c : 3;
	u8 grid[2][5];
	int (*fn)(struct task *);
	u8 tail[];
};

struct task t;
struct orc_entry o;
enum big g;
