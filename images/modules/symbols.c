/*
 * Symbols that are not exported, by livepatch relocations: data, and functions of
 * one name that only their position tells apart. The new sysinfo() reports the
 * value of the first and the addresses of the others, which are never called.
 */
#include "livepatch.h"
#include "sysinfo.h"

extern int nr_threads KLP_SYMBOL("nr_threads", "0");
extern char second_c_start[] KLP_SYMBOL("c_start", "2");
extern char third_c_start[] KLP_SYMBOL("c_start", "3");

#define NEW 0x4e53

static long livepatch_sysinfo(const struct pt_regs *regs)
{
	struct sysinfo info = {
		.totalram = nr_threads,
		.totalhigh = (unsigned long)second_c_start,
		.freehigh = (unsigned long)third_c_start,
		.pad = NEW,
		.mem_unit = 1,
	};

	return sysinfo_reply(regs, &info);
}

LIVEPATCH(PATCH(__x64_sys_sysinfo, livepatch_sysinfo));
