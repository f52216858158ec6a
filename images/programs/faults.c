/*
 * Calls sysinfo() with good and bad addresses: that of the module faults reads
 * there first, and gives back what it has read.
 */
#include "result.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <unistd.h>

/* The mark that modules/faults.c leaves. */
#define NEW 0x4e46
#define WORD 0x766d7061746368UL
#define PAGE 4096

static void must_fault(char *at, const char *what)
{
	if (syscall(SYS_sysinfo, at) != -1 || errno != EFAULT)
		cannot_tell(what);
}

int main(void)
{
	struct sysinfo info = { .uptime = WORD };
	char *pages;

	pages = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (pages == MAP_FAILED || munmap(pages + PAGE, PAGE))
		cannot_tell("a page without a neighbour");
	if (syscall(SYS_sysinfo, &info))
		cannot_tell("sysinfo");
	/* The first read faults; only a later one does. */
	must_fault(pages + PAGE, "no EFAULT outside of memory");
	must_fault(pages + PAGE - 16, "no EFAULT at the end of memory");
	if (info.pad != NEW) {
		puts("flawed: sysinfo() is the old one");
		return FLAWED;
	}
	if (info.totalram != WORD)
		cannot_tell("another word was read");
	puts("fixed: sysinfo() is the new one, and survives bad addresses");
	return FIXED;
}
