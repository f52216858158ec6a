/* Says which of the checks in the module sections hold. */
#include "result.h"

#include <cpuid.h>
#include <sys/sysinfo.h>

/* The mark and the checks of modules/sections.c. */
#define NEW 0x4e58
static const char *const checks[] = {
	"data", "rodata", "alternative-on", "alternative-off", "alternative-call",
	"feature", "indirect-call", "locked", "interrupts", "spinlock",
	"switch", "tail-call", "static-call", "percpu", "own-percpu",
	"ro-after-init", "once", "weak", "debug-print", "tracepoint", "pageless",
};
#define CHECKS (sizeof(checks) / sizeof(checks[0]))
#define FIRST_CALL 42

static int cpu_has_sse4_2(void)
{
	unsigned int eax, ebx, ecx, edx;

	return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_SSE4_2);
}

int main(void)
{
	unsigned long missing;
	struct sysinfo info;
	unsigned int i;

	if (sysinfo(&info))
		cannot_tell("sysinfo");
	if (info.pad != NEW) {
		puts("flawed: sysinfo() is the old one");
		return FLAWED;
	}
	missing = ~info.totalhigh & ((1UL << CHECKS) - 1);
	if (missing || info.freeram != CHECKS || info.totalram < FIRST_CALL ||
	    info.sharedram != (unsigned long)cpu_has_sse4_2()) {
		printf("error: call %lu, %lu checks, sse4.2 %lu; these do not hold:",
		       info.totalram, info.freeram, info.sharedram);
		for (i = 0; i < CHECKS; i++)
			if (missing >> i & 1)
				printf(" %s", checks[i]);
		putchar('\n');
		return UNKNOWN;
	}
	printf("fixed: all %lu checks hold, call %lu\n", info.freeram, info.totalram);
	return FIXED;
}
