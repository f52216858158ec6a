/*
 * An ordinary module that takes most of what the kernel keeps in reserve for
 * modules' per-CPU variables, and writes to all of it. Its parameter intact says
 * whether what it has written is still there.
 */
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/percpu.h>

#define BYTES 6000
#define MARK 0xb5

static DEFINE_PER_CPU(unsigned char[BYTES], marks);

static int intact(char *buffer, const struct kernel_param *param)
{
	unsigned long wrong = 0;
	int cpu, i;

	for_each_possible_cpu(cpu)
		for (i = 0; i < BYTES; i++)
			wrong += READ_ONCE(per_cpu(marks, cpu)[i]) != MARK;
	return sprintf(buffer, "%lu bytes wrong\n", wrong);
}

static const struct kernel_param_ops operations = { .get = intact };
module_param_cb(intact, &operations, NULL, 0444);

static int __init percpu_init(void)
{
	int cpu;

	for_each_possible_cpu(cpu)
		memset(per_cpu(marks, cpu), MARK, BYTES);
	return 0;
}

static void __exit percpu_exit(void) { }

module_init(percpu_init);
module_exit(percpu_exit);
MODULE_LICENSE("GPL");
