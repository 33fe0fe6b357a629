// SPDX-License-Identifier: GPL-2.0-only
/*
 * The generic netlink family: leases, requests and events. What it says is
 * described in uapi/virtexit.h; here it is only translated.
 */
#include <linux/list.h>
#include <linux/module.h>
#include <linux/netlink.h>
#include <linux/slab.h>
#include <net/genetlink.h>
#include <net/net_namespace.h>
#include <net/sock.h>

#include "compat.h"
#include "vx.h"

#define VX_LEASES_MAX 64

#define VX_WISHES_MAX 4096

/**
 * struct vx_wish - a lease's wish for the threads of one process
 * @list: in the lease's wishes
 * @tgid: of the process
 * @start_time: of its first thread
 * @level: wished for
 */
struct vx_wish {
	struct list_head list;
	u32 tgid;
	u64 start_time;
	u32 level;
};

/**
 * struct vx_lease - one socket's wish that collection be on
 * @list: in vx_leases
 * @sk: the socket; valid until it is told to be closing, then never followed
 * @portid: its number in the initial network namespace, which another socket
 *	may have by the time that this one is told to be closing
 * @level: wished for
 * @wishes: for processes that have a wish of their own; under vx_mutex
 * @dead: the socket has been closed
 */
struct vx_lease {
	struct list_head list;
	struct sock *sk;
	u32 portid;
	u32 level;
	struct list_head wishes;
	bool dead;
};

/* Leases come and go under vx_mutex; the lock lets a closing socket in. */
static DEFINE_SPINLOCK(vx_lease_lock);
static LIST_HEAD(vx_leases);
static u32 vx_nr_leases;
static u32 vx_nr_wishes;
/* Since vx_leases_changed() was last asked. Under vx_mutex. */
static bool vx_changed;

static struct genl_family vx_family;

/* The family is registered, so that its group is ours. Under vx_mutex. */
static bool vx_announce;

static struct vx_lease *vx_lease_find(const struct sock *sk)
{
	struct vx_lease *lease;

	list_for_each_entry(lease, &vx_leases, list)
		if (lease->sk == sk && !lease->dead)
			return lease;
	return NULL;
}

static struct vx_wish *vx_wish_find(struct vx_lease *lease, u32 tgid,
				    u64 start_time)
{
	struct vx_wish *wish;

	list_for_each_entry(wish, &lease->wishes, list)
		if (wish->tgid == tgid && wish->start_time == start_time)
			return wish;
	return NULL;
}

static void vx_wish_drop(struct vx_wish *wish)
{
	list_del(&wish->list);
	vx_nr_wishes--;
	vx_changed = true;
	kfree(wish);
}

/**
 * vx_leases_level - the highest level wished for, for whatever; vx_mutex held
 */
u32 vx_leases_level(void)
{
	u32 level = vx_leases_default();
	struct vx_lease *lease;
	struct vx_wish *wish;

	list_for_each_entry(lease, &vx_leases, list)
		list_for_each_entry(wish, &lease->wishes, list)
			level = max(level, wish->level);
	return level;
}

/**
 * vx_leases_default - the level of threads that no wish is for; vx_mutex held
 */
u32 vx_leases_default(void)
{
	u32 level = VIRTEXIT_LEVEL_OFF;
	struct vx_lease *lease;

	list_for_each_entry(lease, &vx_leases, list)
		level = max(level, lease->level);
	return level;
}

/**
 * vx_leases_wish - the level of the threads of a process; vx_mutex held
 * @tgid: of the process
 * @start_time: of its first thread
 */
u32 vx_leases_wish(u32 tgid, u64 start_time)
{
	u32 level = VIRTEXIT_LEVEL_OFF;
	struct vx_lease *lease;
	struct vx_wish *wish;

	list_for_each_entry(lease, &vx_leases, list) {
		wish = vx_wish_find(lease, tgid, start_time);
		level = max(level, wish ? wish->level : lease->level);
	}
	return level;
}

/**
 * vx_leases_reap - drop the leases whose socket is closed; vx_mutex held
 */
void vx_leases_reap(void)
{
	struct vx_lease *lease, *next;
	struct vx_wish *wish, *later;
	LIST_HEAD(dead);

	lockdep_assert_held(&vx_mutex);
	spin_lock_bh(&vx_lease_lock);
	list_for_each_entry_safe(lease, next, &vx_leases, list)
		if (lease->dead)
			list_move(&lease->list, &dead);
	spin_unlock_bh(&vx_lease_lock);
	list_for_each_entry_safe(lease, next, &dead, list) {
		vx_changed = true;
		list_for_each_entry_safe(wish, later, &lease->wishes, list)
			vx_wish_drop(wish);
		vx_nr_leases--;
		kfree(lease);
	}
}

static int vx_lease_set(struct sock *sk, u32 portid, u32 level,
			struct netlink_ext_ack *extack)
{
	struct vx_lease *lease = NULL, *mine;

	if (level != VIRTEXIT_LEVEL_OFF) {
		lease = kzalloc(sizeof(*lease), GFP_KERNEL);
		if (!lease)
			return -ENOMEM;
		INIT_LIST_HEAD(&lease->wishes);
		lease->sk = sk;
		lease->portid = portid;
	}
	spin_lock_bh(&vx_lease_lock);
	mine = vx_lease_find(sk);
	if (!mine && lease) {
		if (vx_nr_leases == VX_LEASES_MAX) {
			spin_unlock_bh(&vx_lease_lock);
			kfree(lease);
			NL_SET_ERR_MSG(extack, "too many sockets hold a lease");
			return -ENOSPC;
		}
		list_add(&lease->list, &vx_leases);
		vx_nr_leases++;
		mine = lease;
		lease = NULL;
	}
	if (mine) {
		mine->level = level;
		vx_changed = true;
		mine->dead = level == VIRTEXIT_LEVEL_OFF;
	}
	spin_unlock_bh(&vx_lease_lock);
	kfree(lease);
	return 0;
}

/**
 * vx_leases_changed - what is wished for is not what it was; vx_mutex held
 */
bool vx_leases_changed(void)
{
	bool changed = vx_changed;

	vx_changed = false;
	return changed;
}

static int vx_wish_set(struct sock *sk, u32 tgid, u64 start_time,
		       const struct nlattr *level, struct genl_info *info)
{
	struct vx_lease *lease;
	struct vx_wish *wish;

	spin_lock_bh(&vx_lease_lock);
	lease = vx_lease_find(sk);
	spin_unlock_bh(&vx_lease_lock);
	if (!lease) {
		NL_SET_ERR_MSG(info->extack, "the socket holds no lease");
		return -ENOENT;
	}
	wish = vx_wish_find(lease, tgid, start_time);
	if (!level) {
		if (wish)
			vx_wish_drop(wish);
		return 0;
	}
	if (!wish) {
		if (vx_nr_wishes == VX_WISHES_MAX) {
			NL_SET_ERR_MSG(info->extack,
				       "too many processes have a level of their own");
			return -ENOSPC;
		}
		wish = kzalloc(sizeof(*wish), GFP_KERNEL);
		if (!wish)
			return -ENOMEM;
		wish->tgid = tgid;
		wish->start_time = start_time;
		list_add(&wish->list, &lease->wishes);
		vx_nr_wishes++;
	}
	wish->level = nla_get_u32(level);
	vx_changed = true;
	return 0;
}

/* A socket closes: its lease dies with it, and the worker sees to the rest. */
static int vx_netlink_notify(struct notifier_block *nb, unsigned long state,
			     void *data)
{
	struct netlink_notify *notify = data;
	struct vx_lease *lease;
	bool any = false;

	if (state != NETLINK_URELEASE || notify->protocol != NETLINK_GENERIC ||
	    !net_eq(notify->net, &init_net))
		return NOTIFY_DONE;
	spin_lock_bh(&vx_lease_lock);
	list_for_each_entry(lease, &vx_leases, list) {
		if (lease->dead || lease->portid != notify->portid ||
		    !sock_flag(lease->sk, SOCK_DEAD))
			continue;
		lease->dead = true;
		any = true;
	}
	spin_unlock_bh(&vx_lease_lock);
	if (any)
		vx_kick();
	return NOTIFY_DONE;
}

static struct notifier_block vx_netlink_nb = {
	.notifier_call = vx_netlink_notify,
};

/* vx_mutex held. */
static int vx_put_info(struct sk_buff *skb)
{
	struct vx_slot_stat slots;
	struct vx_hook_stat hook;

	vx_slot_stat(&slots);
	vx_hook_stat(&hook);
	if (nla_put_string(skb, VIRTEXIT_A_VERSION, VX_VERSION) ||
	    nla_put_u32(skb, VIRTEXIT_A_ABI, VIRTEXIT_ABI) ||
	    nla_put_u32(skb, VIRTEXIT_A_LEVEL, hook.level) ||
	    nla_put_u32(skb, VIRTEXIT_A_HOOK, hook.hook) ||
	    nla_put_u32(skb, VIRTEXIT_A_ISA, hook.isa) ||
	    (hook.kvm && nla_put_flag(skb, VIRTEXIT_A_KVM)) ||
	    (hook.refused &&
	     nla_put_string(skb, VIRTEXIT_A_REFUSED, hook.refused)) ||
	    nla_put_u32(skb, VIRTEXIT_A_SLOTS_MAX, slots.max) ||
	    nla_put_u32(skb, VIRTEXIT_A_SLOTS_LIVE, slots.live) ||
	    nla_put_u32(skb, VIRTEXIT_A_SLOTS_RETIRED, slots.retired) ||
	    nla_put_u32(skb, VIRTEXIT_A_SLOTS_BACKED, slots.backed) ||
	    nla_put_u32(skb, VIRTEXIT_A_LEASES, vx_nr_leases))
		return -EMSGSIZE;
	return 0;
}

static int vx_get_doit(struct sk_buff *skb, struct genl_info *info)
{
	struct sk_buff *reply;
	void *hdr;
	int err;

	reply = genlmsg_new(NLMSG_GOODSIZE, GFP_KERNEL);
	if (!reply)
		return -ENOMEM;
	hdr = genlmsg_put_reply(reply, info, &vx_family, 0, VIRTEXIT_CMD_GET);
	if (!hdr) {
		err = -EMSGSIZE;
		goto free;
	}
	mutex_lock(&vx_mutex);
	err = vx_put_info(reply);
	mutex_unlock(&vx_mutex);
	if (err)
		goto free;
	genlmsg_end(reply, hdr);
	return genlmsg_reply(reply, info);
free:
	nlmsg_free(reply);
	return err;
}

static int vx_lease_doit(struct sk_buff *skb, struct genl_info *info)
{
	int err;

	if (!info->attrs[VIRTEXIT_A_LEVEL]) {
		NL_SET_ERR_MSG(info->extack, "no level given");
		return -EINVAL;
	}
	mutex_lock(&vx_mutex);
	vx_leases_reap();
	err = vx_lease_set(NETLINK_CB(skb).sk, info->snd_portid,
			   nla_get_u32(info->attrs[VIRTEXIT_A_LEVEL]),
			   info->extack);
	if (!err) {
		vx_leases_reap();
		/* Before the first exit asks for one. */
		if (vx_leases_level())
			vx_slots_refill();
		vx_hook_update();
	}
	mutex_unlock(&vx_mutex);
	if (!err)
		vx_kick();
	return err;
}

static int vx_level_doit(struct sk_buff *skb, struct genl_info *info)
{
	struct nlattr *tgid = info->attrs[VIRTEXIT_A_TGID];
	struct nlattr *start_time = info->attrs[VIRTEXIT_A_START_TIME];
	int err;

	if (!tgid || !start_time) {
		NL_SET_ERR_MSG(info->extack,
			       "a process needs tgid and start time");
		return -EINVAL;
	}
	mutex_lock(&vx_mutex);
	err = vx_wish_set(NETLINK_CB(skb).sk, nla_get_u32(tgid),
			  nla_get_u64(start_time),
			  info->attrs[VIRTEXIT_A_LEVEL], info);
	if (!err) {
		vx_hook_update();
		vx_slots_recent();
	}
	mutex_unlock(&vx_mutex);
	return err;
}

static const struct nla_policy vx_slot_ref_policy[VIRTEXIT_A_MAX + 1] = {
	[VIRTEXIT_A_SLOT] = { .type = NLA_U32 },
	[VIRTEXIT_A_GENERATION] = { .type = NLA_U32 },
};

static int vx_release_one(const struct nlattr *ref, struct genl_info *info)
{
	struct nlattr *tb[VIRTEXIT_A_MAX + 1];
	int err;

	err = nla_parse_nested(tb, VIRTEXIT_A_MAX, ref, vx_slot_ref_policy,
			       info->extack);
	if (err)
		return err;
	if (!tb[VIRTEXIT_A_SLOT] || !tb[VIRTEXIT_A_GENERATION]) {
		NL_SET_ERR_MSG_ATTR(info->extack, ref,
				    "a slot reference needs slot and generation");
		return -EINVAL;
	}
	err = vx_slot_release(nla_get_u32(tb[VIRTEXIT_A_SLOT]),
			      nla_get_u32(tb[VIRTEXIT_A_GENERATION]));
	if (err)
		NL_SET_ERR_MSG_ATTR(info->extack, ref,
				    "not a retired slot of this generation");
	return err;
}

static int vx_release_doit(struct sk_buff *skb, struct genl_info *info)
{
	struct nlattr *attr;
	int rem, err = 0;

	if (!info->attrs[VIRTEXIT_A_SLOT_REF]) {
		NL_SET_ERR_MSG(info->extack, "no slot reference given");
		return -EINVAL;
	}
	mutex_lock(&vx_mutex);
	nlmsg_for_each_attr(attr, info->nlhdr, GENL_HDRLEN, rem) {
		if (nla_type(attr) != VIRTEXIT_A_SLOT_REF)
			continue;
		err = vx_release_one(attr, info);
		if (err)
			break;
	}
	vx_slots_reclaim();
	mutex_unlock(&vx_mutex);
	/* Without readers the memory can go. */
	vx_kick();
	return err;
}

/* What is not named here is refused. */
static const struct nla_policy vx_get_policy[VIRTEXIT_A_MAX + 1] = { };

static const struct nla_policy vx_lease_policy[VIRTEXIT_A_MAX + 1] = {
	[VIRTEXIT_A_LEVEL] = NLA_POLICY_MAX(NLA_U32, VIRTEXIT_LEVEL_RECENT),
};

static const struct nla_policy vx_level_policy[VIRTEXIT_A_MAX + 1] = {
	[VIRTEXIT_A_TGID] = { .type = NLA_U32 },
	[VIRTEXIT_A_START_TIME] = { .type = NLA_U64 },
	[VIRTEXIT_A_LEVEL] = NLA_POLICY_RANGE(NLA_U32, VIRTEXIT_LEVEL_PAUSE,
					      VIRTEXIT_LEVEL_RECENT),
};

static const struct nla_policy vx_release_policy[VIRTEXIT_A_MAX + 1] = {
	[VIRTEXIT_A_SLOT_REF] = NLA_POLICY_NESTED(vx_slot_ref_policy),
};

static const struct genl_ops vx_ops[] = {
	{
		.cmd = VIRTEXIT_CMD_GET,
		.policy = vx_get_policy,
		.maxattr = VIRTEXIT_A_MAX,
		.doit = vx_get_doit,
	}, {
		.cmd = VIRTEXIT_CMD_LEASE,
		.flags = GENL_ADMIN_PERM,
		.policy = vx_lease_policy,
		.maxattr = VIRTEXIT_A_MAX,
		.doit = vx_lease_doit,
	}, {
		.cmd = VIRTEXIT_CMD_LEVEL,
		.flags = GENL_ADMIN_PERM,
		.policy = vx_level_policy,
		.maxattr = VIRTEXIT_A_MAX,
		.doit = vx_level_doit,
	}, {
		.cmd = VIRTEXIT_CMD_RELEASE,
		.flags = GENL_ADMIN_PERM,
		.policy = vx_release_policy,
		.maxattr = VIRTEXIT_A_MAX,
		.doit = vx_release_doit,
	},
};

static const struct genl_multicast_group vx_groups[] = {
	{
		.name = VIRTEXIT_GENL_GROUP,
		.flags = GENL_MCAST_CAP_NET_ADMIN,
	},
};

static struct genl_family vx_family __ro_after_init = {
	.name = VIRTEXIT_GENL_NAME,
	.version = VIRTEXIT_GENL_VERSION,
	.module = THIS_MODULE,
	.parallel_ops = true,	/* vx_mutex orders requests */
	.ops = vx_ops,
	.n_ops = ARRAY_SIZE(vx_ops),
	.mcgrps = vx_groups,
	.n_mcgrps = ARRAY_SIZE(vx_groups),
};

static struct sk_buff *vx_event_new(u8 cmd, void **hdr)
{
	struct sk_buff *skb;

	if (!vx_announce)
		return NULL;
	skb = genlmsg_new(NLMSG_GOODSIZE, GFP_KERNEL);
	if (!skb)
		return NULL;
	*hdr = genlmsg_put(skb, 0, 0, &vx_family, 0, cmd);
	if (!*hdr) {
		nlmsg_free(skb);
		return NULL;
	}
	return skb;
}

static void vx_event_send(struct sk_buff *skb, void *hdr)
{
	genlmsg_end(skb, hdr);
	/* Nobody may be listening; who misses one is told by his socket. */
	genlmsg_multicast_netns(&vx_family, &init_net, skb, 0, 0, GFP_KERNEL);
}

/**
 * vx_send_vcpu_events - announce the slots whose state has changed; vx_mutex held
 */
void vx_send_vcpu_events(void)
{
	struct vx_slot_ref ref;
	struct sk_buff *skb;
	void *hdr;

	while (vx_slot_next_event(&ref)) {
		skb = vx_event_new(VIRTEXIT_CMD_VCPU_EVENT, &hdr);
		if (!skb)
			continue;
		if (nla_put_u32(skb, VIRTEXIT_A_SLOT, ref.index) ||
		    nla_put_u32(skb, VIRTEXIT_A_GENERATION, ref.generation) ||
		    nla_put_u32(skb, VIRTEXIT_A_STATE, ref.state) ||
		    nla_put_u32(skb, VIRTEXIT_A_TID, ref.tid) ||
		    nla_put_u32(skb, VIRTEXIT_A_TGID, ref.tgid) ||
		    nla_put_u32(skb, VIRTEXIT_A_VCPU_ID, ref.vcpu_id))
			nlmsg_free(skb);
		else
			vx_event_send(skb, hdr);
	}
}

/**
 * vx_send_kvm_event - announce that KVM or the level changed; vx_mutex held
 */
void vx_send_kvm_event(void)
{
	struct sk_buff *skb;
	void *hdr;

	skb = vx_event_new(VIRTEXIT_CMD_KVM_EVENT, &hdr);
	if (!skb)
		return;
	if (vx_put_info(skb))
		nlmsg_free(skb);
	else
		vx_event_send(skb, hdr);
}

int vx_netlink_init(void)
{
	int err;

	err = netlink_register_notifier(&vx_netlink_nb);
	if (err)
		return err;
	err = genl_register_family(&vx_family);
	if (err) {
		netlink_unregister_notifier(&vx_netlink_nb);
		return err;
	}
	mutex_lock(&vx_mutex);
	vx_announce = true;
	mutex_unlock(&vx_mutex);
	return 0;
}

/* No request runs or comes any more; what leases there are end here. */
void vx_netlink_exit(void)
{
	struct vx_lease *lease;

	mutex_lock(&vx_mutex);
	vx_announce = false;
	mutex_unlock(&vx_mutex);
	genl_unregister_family(&vx_family);
	netlink_unregister_notifier(&vx_netlink_nb);

	mutex_lock(&vx_mutex);
	list_for_each_entry(lease, &vx_leases, list)
		lease->dead = true;
	vx_leases_reap();
	mutex_unlock(&vx_mutex);
}
