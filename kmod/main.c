// SPDX-License-Identifier: GPL-2.0-only
/*
 * virtexit: counts the VM exits of every vCPU thread of this host, in place.
 * uapi/virtexit.h says how they are read.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/irq_work.h>
#include <linux/module.h>
#include <linux/workqueue.h>
#include <asm/tsc.h>

#include "compat.h"
#include "vx.h"

/* What is attached, and why: leases, tracepoints, the vendor module. */
DEFINE_MUTEX(vx_mutex);

/* All that a probe or a closing socket leaves to be done. */
static void vx_work_fn(struct work_struct *work)
{
	mutex_lock(&vx_mutex);
	vx_leases_reap();
	vx_hook_update();
	vx_slots_recent();
	if (vx_leases_level())
		vx_slots_refill();
	else
		vx_slots_trim();
	vx_send_vcpu_events();
	mutex_unlock(&vx_mutex);
}

static DECLARE_WORK(vx_work, vx_work_fn);

static void vx_irq_work_fn(struct irq_work *work)
{
	queue_work(system_unbound_wq, &vx_work);
}

static DEFINE_IRQ_WORK(vx_irq_work, vx_irq_work_fn);

/**
 * vx_kick - have the worker look
 */
void vx_kick(void)
{
	queue_work(system_unbound_wq, &vx_work);
}

/**
 * vx_kick_atomic - have the worker look; from a probe, whatever its context
 */
void vx_kick_atomic(void)
{
	irq_work_queue(&vx_irq_work);
}

static int __init vx_load(void)
{
	int err;

	if (!tsc_khz) {
		pr_err("the rate of the TSC is not known\n");
		return -ENODEV;
	}
	vx_time_init();
	err = vx_slots_init();
	if (err)
		return err;
	err = vx_netlink_init();
	if (err)
		goto slots;
	err = vx_hook_init();
	if (err)
		goto netlink;
	err = vx_device_init();
	if (err)
		goto hook;
	return 0;

hook:
	vx_netlink_exit();
	vx_hook_exit();
	goto work;
netlink:
	vx_netlink_exit();
work:
	irq_work_sync(&vx_irq_work);
	cancel_work_sync(&vx_work);
slots:
	vx_slots_exit();
	return err;
}

static void __exit vx_unload(void)
{
	vx_device_exit();
	/* Leases first: nothing can be attached without one. */
	vx_netlink_exit();
	vx_hook_exit();
	irq_work_sync(&vx_irq_work);
	cancel_work_sync(&vx_work);
	vx_slots_exit();
}

module_init(vx_load);
module_exit(vx_unload);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("VM exits by vCPU thread and reason");
MODULE_VERSION(VX_VERSION);
