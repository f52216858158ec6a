/*
 * New sysinfo() system calls: the cheapest way for any user's program to call a
 * function of the kernel, and to get fourteen words back.
 */
#ifndef SYSINFO_H
#define SYSINFO_H

#include <linux/string.h>
#include <linux/sysinfo.h>
#include <linux/uaccess.h>
#include <asm/ptrace.h>

/* Word by word: put_user() is a call, larger copies need an exception table. */
static inline long sysinfo_copy(struct sysinfo __user *reply, const struct sysinfo *info)
{
	unsigned long __user *to = (unsigned long __user *)reply;
	const unsigned long *from = (const unsigned long *)info;
	unsigned int i;

	for (i = 0; i < sizeof(*info) / sizeof(*from); i++)
		if (put_user(from[i], to + i))
			return -EFAULT;
	return 0;
}

static inline long sysinfo_reply(const struct pt_regs *regs, const struct sysinfo *info)
{
	return sysinfo_copy((struct sysinfo __user *)regs->di, info);
}

#endif
