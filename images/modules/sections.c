/*
 * Every section that a loader has to work on before new code runs as it should,
 * in one new sysinfo(). Each check that holds sets its bit in totalhigh; the
 * program sections knows their names. Its first call counts 41 on to 42.
 */
#include <linux/irqflags.h>
#include <linux/kernel_stat.h>
#include <linux/mm.h>
#include <linux/spinlock.h>
#include <linux/static_call.h>
#include <asm/alternative.h>
#include <asm/cpufeature.h>
#include "livepatch.h"
#include "sysinfo.h"

#define NEW 0x4e58

enum {
	DATA,		/* .data, .bss */
	RODATA,		/* .rodata, .rodata.str* */
	ALTERNATIVE_ON,	/* .altinstructions for a feature that is always there */
	ALTERNATIVE_OFF, /* ... and for one that never is */
	ALTERNATIVE_CALL, /* ... with a call, whose distance changes as it moves */
	FEATURE,	/* cpu_feature_enabled(): a jump, and code in .altinstr_aux */
	INDIRECT_CALL,	/* .retpoline_sites */
	LOCKED,		/* .smp_locks */
	INTERRUPTS,	/* .parainstructions, or alternatives since 6.8 */
	SPINLOCK,
	SWITCH,		/* a table of jumps */
	TAIL_CALL,
	STATIC_CALL,	/* .static_call_sites, and a trampoline of the module's own */
	PERCPU,		/* a variable of the kernel's for each CPU */
	OWN_PERCPU,	/* .data..percpu */
	RO_AFTER_INIT,	/* .data..ro_after_init */
	ONCE,		/* .data..once */
	WEAK,		/* a weak symbol that nobody defines */
	DEBUG_PRINT,	/* __dyndbg, and the static key in it */
	TRACEPOINT,	/* __tracepoints, with a static key and a static call; .ref.data, _ftrace_events */
	PAGELESS,	/* no address is taken for one of the kernel's image, and so for a page of somebody else's */
	CHECKS
};

static unsigned long calls = 41;
static unsigned long zeroes[600];
static const char text[] = "a text of the module";
static atomic_t atomic = ATOMIC_INIT(0);
static DEFINE_SPINLOCK(lock);

static noinline int add(int a, int b) { return a + b; }
static noinline int take(int a, int b) { return a - b; }
static int (*const operations[])(int, int) = { add, take };

asmlinkage __used int vmpatch_test_one(void);
asmlinkage __used int vmpatch_test_two(void);
asmlinkage __used noinline int vmpatch_test_one(void) { return 1; }
asmlinkage __used noinline int vmpatch_test_two(void) { return 2; }

static bool data_holds(void)
{
	unsigned long sum = 0;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(zeroes); i++)
		sum += READ_ONCE(zeroes[i]);
	return sum == 0;
}

static bool rodata_holds(void)
{
	const char *volatile pointer = text;

	return !strcmp(pointer, "a text of the module");
}

static int alternative_on(void)
{
	int which;

	asm volatile(ALTERNATIVE("movl $1, %0", "movl $2, %0", X86_FEATURE_ALWAYS)
		     : "=r" (which));
	return which;
}

static int alternative_off(void)
{
	int which;

	asm volatile(ALTERNATIVE("movl $1, %0", "movl $2, %0",
				 ALT_NOT(X86_FEATURE_ALWAYS))
		     : "=r" (which));
	return which;
}

static int alternative_called(void)
{
	int which;

	asm volatile(ALTERNATIVE("call vmpatch_test_one", "call vmpatch_test_two",
				 X86_FEATURE_ALWAYS)
		     : "=a" (which), ASM_CALL_CONSTRAINT
		     : : "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11",
			 "memory", "cc");
	return which;
}

static bool indirect_calls_hold(void)
{
	unsigned int volatile first = 0, second = 1;

	return operations[first](5, 3) == 8 && operations[second](5, 3) == 2;
}

static bool locked_holds(void)
{
	atomic_add(3, &atomic);
	return atomic_sub_return(3, &atomic) >= 0;
}

static bool interrupts_hold(void)
{
	unsigned long flags;
	bool before = irqs_disabled(), between, after;

	local_irq_save(flags);
	between = irqs_disabled();
	local_irq_restore(flags);
	after = irqs_disabled();
	return !before && between && !after;
}

/* The kernel is built without tables of jumps, as they are indirect branches. */
#define CASE(which, value) case which: asm volatile("movl %1, %0" : "=r" (result) : "i" (value)); break

/* With IBT the compiler would go through thunks that the kernel does not have. */
#ifdef CONFIG_X86_KERNEL_IBT
#define TABLE
#else
#define TABLE __attribute__((optimize("jump-tables")))
#endif

static noinline TABLE int switched(int which)
{
	int result = 0;

	switch (which) {
	CASE(0, 31);
	CASE(1, 14);
	CASE(2, 15);
	CASE(3, 92);
	CASE(4, 65);
	CASE(5, 35);
	CASE(6, 89);
	}
	return result;
}

static bool switch_holds(void)
{
	int volatile first = 0, last = 6, none = 7;

	return switched(first) == 31 && switched(last) == 89 && switched(none) == 0;
}

static noinline int added_in_the_tail(int a, int b)
{
	int volatile sum = a + b;

	return add(sum, 1);
}

DEFINE_STATIC_CALL(vmpatch_test_call, add);

static bool static_call_holds(void)
{
	return static_call(vmpatch_test_call)(5, 3) == 8;
}

static bool percpu_holds(void)
{
	bool holds;

	preempt_disable();
	holds = this_cpu_read(kstat.irqs_sum) != 0 &&
		this_cpu_ptr(&kstat) == per_cpu_ptr(&kstat, smp_processor_id());
	preempt_enable();
	return holds;
}

#define OWN 7

static DEFINE_PER_CPU(unsigned long, own) = OWN;
static DEFINE_PER_CPU(unsigned long[24], own_zeroes) __aligned(64);
static unsigned long __percpu *own_pointer = &own;

static bool own_percpu_holds(void)
{
	unsigned long misaligned, mine, sum = 0, wrong = 0;
	int cpu, i;

	preempt_disable();
	this_cpu_add(own, 1);
	mine = *this_cpu_ptr(own_pointer);
	misaligned = (unsigned long)this_cpu_ptr(&own_zeroes) % 64;
	for_each_possible_cpu(cpu) {
		wrong += per_cpu(own, cpu) - OWN > 1;
		for (i = 0; i < ARRAY_SIZE(own_zeroes); i++)
			sum += per_cpu(own_zeroes, cpu)[i];
	}
	this_cpu_sub(own, 1);
	preempt_enable();
	return mine == OWN + 1 && !misaligned && !wrong && !sum;
}

static unsigned long ro_after_init __ro_after_init = 13;

static bool ro_after_init_holds(void)
{
	return READ_ONCE(ro_after_init) == 13;
}

static bool once_holds(void)
{
	int i, times = 0;

	for (i = 0; i < 3; i++) {
		static bool __section(".data..once") done;

		times += !READ_ONCE(done);
		WRITE_ONCE(done, true);
		pr_info_once("vmpatch test: said once\n");
	}
	return times <= 1;
}

extern void vmpatch_test_absent(void) __weak;

static bool weak_holds(void)
{
	return !vmpatch_test_absent;
}

static bool debug_print_holds(void)
{
	bool evaluated = false;

	pr_debug("vmpatch test: never said %d\n", evaluated = true);
	return !evaluated;
}

enum { VMPATCH_TEST_ODD = 1 };
#define CREATE_TRACE_POINTS
#include "vmpatch_trace.h"

static bool tracepoint_holds(void)
{
	trace_vmpatch_test(42);
	return !trace_vmpatch_test_enabled();
}

static bool spinlock_holds(void)
{
	bool locked;

	spin_lock(&lock);
	locked = spin_is_locked(&lock);
	spin_unlock(&lock);
	return locked;
}

static bool pageless_holds(void)
{
	return !virt_addr_valid(&calls) && !virt_addr_valid(zeroes) && !virt_addr_valid(text) &&
	       !virt_addr_valid(pageless_holds);
}

static long livepatch_sysinfo(const struct pt_regs *regs)
{
	struct sysinfo info = {
		.totalram = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED),
		.freeram = CHECKS,
		.sharedram = cpu_feature_enabled(X86_FEATURE_XMM4_2),
		.pad = NEW,
		.mem_unit = 1,
	};

	info.totalhigh = data_holds() << DATA |
			 rodata_holds() << RODATA |
			 (alternative_on() == 2) << ALTERNATIVE_ON |
			 (alternative_off() == 1) << ALTERNATIVE_OFF |
			 (alternative_called() == 2) << ALTERNATIVE_CALL |
			 (cpu_feature_enabled(X86_FEATURE_LM) && !cpu_feature_enabled(X86_FEATURE_K8)) << FEATURE |
			 indirect_calls_hold() << INDIRECT_CALL |
			 locked_holds() << LOCKED |
			 interrupts_hold() << INTERRUPTS |
			 spinlock_holds() << SPINLOCK |
			 switch_holds() << SWITCH |
			 (added_in_the_tail(5, 3) == 9) << TAIL_CALL |
			 static_call_holds() << STATIC_CALL |
			 percpu_holds() << PERCPU |
			 own_percpu_holds() << OWN_PERCPU |
			 ro_after_init_holds() << RO_AFTER_INIT |
			 once_holds() << ONCE |
			 weak_holds() << WEAK |
			 debug_print_holds() << DEBUG_PRINT |
			 tracepoint_holds() << TRACEPOINT |
			 pageless_holds() << PAGELESS;
	return sysinfo_reply(regs, &info);
}

LIVEPATCH(PATCH(__x64_sys_sysinfo, livepatch_sysinfo));
